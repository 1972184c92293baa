"""Triton's own protobuf messages, from the optional package tritonclient."""

from __future__ import annotations

from typing import Any

from optin_export.errors import missing_package


def check_tools() -> None:
    """Raises EnvironmentLacks if Triton's configuration cannot be written here."""
    protobuf()


def protobuf() -> tuple[Any, Any]:
    """google.protobuf.text_format and Triton's model_config_pb2. Raises EnvironmentLacks without them."""
    try:
        from google.protobuf import text_format
        from tritonclient.grpc import model_config_pb2
    except ImportError:
        raise missing_package("tritonclient", "ship: {triton: true}", "triton") from None
    return text_format, model_config_pb2
