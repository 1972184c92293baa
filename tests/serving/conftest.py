"""The finished run whose models are served."""

from tests.ship.conftest import finished, run

__all__ = ["finished", "run"]
