"""`potluck models provenance`: where a model's bytes came from, under which licence, and their hashes."""

from __future__ import annotations

from pathlib import Path

from cluster.cli.stored_models import answer, hashed, matching, say
from cluster.errors import ModelError
from cluster.models.card import printable
from cluster.models.manifest import Manifest
from cluster.quantities import format_bytes
from coordinator.hub import find_model
from coordinator.server import conversions_folder


def provenance_command(text: str, revision: str | None, state: Path | None, as_json: bool) -> int:
    manifest = _manifest(text, revision, state, as_json)
    files = [{"name": f.name, "bytes": f.size_bytes, "sha256": f.sha256} for f in manifest.files]
    if as_json:
        return answer(
            {
                "name": manifest.name,
                "id": manifest.id,
                "source": manifest.source,
                "revision": manifest.revision,
                "licence": manifest.licence,
                "tensors": len(manifest.tensors),
                "conversions": list(manifest.conversions),
                "files": files,
            }
        )
    say(f"{printable(manifest.name)}  {manifest.id}")
    say(f"  source    {printable(manifest.source) or 'not recorded'}")
    say(f"  revision  {printable(manifest.revision)}")
    say(f"  licence   {printable(manifest.licence) or 'not stated in the model card, and no licence file'}")
    say(f"  tensors   {len(manifest.tensors)}, each with a hash of its own")
    for line in manifest.conversions or ("nothing: stored as it was published",):
        say(f"  changed   {printable(line)}")
    for entry in manifest.files:
        say(f"  {entry.sha256}  {format_bytes(entry.size_bytes):>10}  {entry.name}")
    return 0


def _manifest(text: str, revision: str | None, state: Path | None, as_json: bool) -> Manifest:
    """As a node's store remembers it, else of the folder or the hub's cache: what is not here is not asked for."""
    try:
        stored = [model.manifest for model in matching(text, state) if model.manifest is not None]
    except ModelError as nowhere:
        found = find_model(text, conversions=conversions_folder(state), revision=revision)
        if found is None:
            raise ModelError(f"{text} is not on this machine; `potluck models pull {text}` downloads it") from nowhere
        return hashed(found, state, as_json)
    if not stored:
        raise ModelError(f"the manifest of {text} is damaged; the next load fetches it again")
    return stored[0]
