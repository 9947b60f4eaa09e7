"""Which keys may open a host, as ssh(1) has it: those of IdentityFile, those that ssh-agent holds.

asyncssh stops at the first file that it cannot read, and wants the private half of a key that
the agent holds; ssh(1) passes over the one and is content without the other.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import asyncssh

#: what ssh(1) tries where ssh_config names no IdentityFile
_DEFAULT_FILES = ("id_rsa", "id_ecdsa", "id_ecdsa_sk", "id_ed25519", "id_ed25519_sk")


@dataclass(frozen=True)
class Keys:
    """What to open a host with."""

    #: pairs from files that need no passphrase
    pairs: tuple[asyncssh.SSHKeyPair, ...]
    #: files that do need one
    locked: tuple[Path, ...]
    #: what to ask of the agent; None: any key that it holds
    of_agent: tuple[asyncssh.SSHKey, ...] | None


def keys_for(settings: asyncssh.SSHClientConnectionOptions) -> Keys:
    """What IdentityFile, CertificateFile and IdentitiesOnly of a host come to."""
    files = _files(settings)
    certificates: list[str] = [
        str(Path(name).expanduser()) for name in _names(settings, "CertificateFile") or ()
    ]
    pairs: list[asyncssh.SSHKeyPair] = []
    locked = []
    for file in files:
        try:
            pairs += asyncssh.load_keypairs([str(file)], certlist=certificates)
        except (OSError, ValueError) as exc:  # not there, not ours to read, no private key at all
            if "assphrase" in str(exc):
                locked.append(file)
    only = settings.config.get("IdentitiesOnly")
    of_agent = tuple(key for file in files if (key := public_key(file))) if only else None
    return Keys(tuple(pairs), tuple(locked), of_agent)


def public_key(file: Path) -> asyncssh.SSHKey | None:
    """The public half of a key, which may be there without the other."""
    for path in (file.with_name(f"{file.name}.pub"), file):
        try:
            return asyncssh.read_public_key(str(path))
        except (OSError, ValueError):
            continue
    return None


async def held_by_agent(settings: asyncssh.SSHClientConnectionOptions) -> set[bytes] | None:
    """The public keys that the agent holds; None where none answers."""
    path = settings.config.get("IdentityAgent", os.environ.get("SSH_AUTH_SOCK"))
    if not path:
        return None
    try:
        agent = await asyncssh.connect_agent(str(Path(str(path)).expanduser()))
        try:
            return {key.public_data for key in await agent.get_keys()}
        finally:
            agent.close()
    except (OSError, ValueError, asyncssh.Error):
        return None


async def how_to_unlock(settings: asyncssh.SSHClientConnectionOptions, locked: Sequence[Path]) -> str:
    """What to type so that keys with a passphrase can be used; nothing where the agent holds them all."""
    held = await held_by_agent(settings)
    for file in locked:
        key = public_key(file)
        if held is None or key is None or key.public_data not in held:
            first = 'eval "$(ssh-agent)"; ' if held is None else ""
            return f"{file} has a passphrase, and nothing here asks for it: {first}ssh-add {file}"
    return ""


def _files(settings: asyncssh.SSHClientConnectionOptions) -> list[Path]:
    named = _names(settings, "IdentityFile")
    if named is None:
        named = [f"~/.ssh/{name}" for name in _DEFAULT_FILES]
    return [Path(name).expanduser() for name in named]


def _names(settings: asyncssh.SSHClientConnectionOptions, option: str) -> list[str] | None:
    found = settings.config.get(option)
    return [str(name) for name in found] if isinstance(found, list) else None
