"""The adapter directory: what was learned, the config that made it, and which base it fits."""

import hashlib
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers import ModelMixin

from esd_peft._version import __version__
from esd_peft.adapters.export import limits, own_metadata, write_kohya_lora
from esd_peft.io.outputs import new_directory
from esd_peft.io.paths import is_file
from esd_peft.io.tensors import add_metadata, sha256
from esd_peft.models import ModelFamily
from esd_peft.models.hub_cache import commit_of
from esd_peft.options.model import PretrainedOptions

ADAPTER = "an adapter"  # kind of the directory


@dataclass
class Provenance:
    """The origin of an adapter."""

    family: ModelFamily
    pretrained: PretrainedOptions
    denoiser_sha256: dict[str, str]
    concepts: list[str]
    scope: str
    config: str  # the YAML that makes it again

    def to_dict(self) -> dict[str, Any]:
        """Return the content of `base.json`, without the hashes of the adapter's own files."""
        return {
            "model": self.pretrained.model,
            "revision": commit_of(self.pretrained.model, self.family.path),
            "variant": self.pretrained.variant,
            "checkpoint_config": self.pretrained.checkpoint_config,
            "name": self.family.name,
            "class": self.family.pipeline_class.__name__,
            "denoiser_sha256": self.denoiser_sha256,
            "version": __version__,
        }


def save_adapter(
    write: Callable[[Path], None], output: Path, overwrite: bool, provenance: Provenance, is_lora: bool
) -> None:
    """Save an adapter: `write` fills the directory `output`, which also gets `config.yaml`, `base.json` and the files of
    other tools.

    Raises `UserError` if it cannot be written, and then leaves nothing.
    """
    base = provenance.to_dict()
    digest = hashlib.sha256(provenance.config.encode()).hexdigest()
    metadata = own_metadata(provenance.concepts, [provenance.scope], base, [digest])
    with new_directory(output, ADAPTER, overwrite) as draft:
        write(draft)
        for file in draft.glob("*.safetensors"):
            add_metadata(file, metadata)
        if is_lora:
            write_kohya_lora(draft, provenance.family, output.name, provenance.concepts, provenance.scope, metadata)
        (draft / "config.yaml").write_text(provenance.config, encoding="utf-8")
        base["files"] = {file.name: sha256(file) for file in sorted(draft.iterdir()) if is_file(file)}
        (draft / "base.json").write_text(json.dumps(base, indent=2) + "\n", encoding="utf-8")


def note_limits(family: ModelFamily, denoiser: ModelMixin, scope: str) -> None:
    """Say on stderr what other tools do not make of the LoRA."""
    for note in limits(family, family.scope_modules(denoiser, scope)):
        print(f"note: {note}", file=sys.stderr)
