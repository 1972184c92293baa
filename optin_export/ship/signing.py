"""Signatures of shipped models by the package `model-signing` (OpenSSF), with key files: no network is used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from optin_export.errors import EnvironmentLacks, InputError, missing_package
from optin_export.ship.manifest import SIGNATURE


def check_key(key: Path) -> None:
    """Raises InputError for a key that cannot be read, EnvironmentLacks without the package."""
    _import()
    if not key.is_file():
        raise InputError(f"cannot read the key {key}", "no such file", "give a PEM file of an elliptic-curve key")


def sign(folder: Path, key: Path) -> None:
    """Sign every file of a model folder, its manifest included, into model.sig. key: PEM of an elliptic curve."""
    signing = _import()
    check_key(key)
    hashing = signing.hashing.Config().set_ignored_paths(paths=[folder / SIGNATURE], ignore_git_paths=False)
    try:
        config = signing.signing.Config().use_elliptic_key_signer(private_key=key).set_hashing_config(hashing)
        config.sign(folder, folder / SIGNATURE)
    except OSError as error:
        raise EnvironmentLacks(f"cannot sign {folder.name}", str(error), "free disk space") from error
    except (ValueError, TypeError) as error:  # no key, another kind of key, or one with a password
        raise InputError(f"cannot sign with {key}", str(error), "give a PEM private key, P-256, without one") from None


def check_signature(folder: Path, key: Path) -> str | None:
    """The problem with the signature of a model folder under a public key; None if it is valid."""
    signing = _import()
    check_key(key)
    if not (folder / SIGNATURE).is_file():
        return f"{SIGNATURE}: missing, the model is not signed"
    try:
        config = signing.verifying.Config().use_elliptic_key_verifier(public_key=key)
        config.verify(folder, folder / SIGNATURE)
    except Exception as error:  # the package raises ValueError, the one below InvalidSignature and others
        return f"{SIGNATURE}: does not hold: {' '.join((str(error) or type(error).__name__).split())[:200]}"
    return None


def _import() -> Any:
    try:
        import model_signing
    except ImportError:
        raise missing_package("model-signing", "signing a shipment", "signing") from None
    return model_signing
