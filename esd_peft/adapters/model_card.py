"""The README.md of a merged model or an adapter: licence, erased concepts, base, settings, and evaluation results."""

import contextlib
import re
from pathlib import Path
from typing import Any

import yaml
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from huggingface_hub import ModelCardData

from esd_peft.adapters.saved import Adapter
from esd_peft.io.paths import exists, is_file, reading
from esd_peft.io.text import UnreadableError, parse_yaml
from esd_peft.models import ModelFamily
from esd_peft.models.sources import inside_model

TAGS = ["text-to-image", "diffusers", "concept-erasure", "esd"]
_LOCAL = ("output", "overwrite", "preserve_file", "reference", "checkpoint_config", "device", "report_to",
          "push_to_hub", "hub_model_id", "hub_private")  # fmt: skip
_HEADER = re.compile(r"---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|\Z)", re.DOTALL)
_LARGEST_HEADER = 2**18  # bytes
_MARKDOWN = re.compile(r"([\\`*_{}\[\]()<>#+!|~&$-])")


def model_card(record: dict[str, Any], family: ModelFamily, adapters: list[Adapter], title: str) -> str:
    """A merged model's card as Markdown with the hub's YAML header. `record` is what `erased.json` holds."""
    base = record["base"]
    hashes = base["denoiser_sha256"].items()
    sections = [
        f"This is {_origin(base)} without these concepts, which were erased from its weights:",
        _concepts(record["concept"]),
        *(escape(note) for note in record["notes"]),
        f"It is a plain diffusers pipeline: `{family.pipeline_class.__name__}.from_pretrained` loads it. {_RECOVERY}",
        "## How",
        f"{_method(record['version'])}; {record['merged_tensors']} weights of the {family.denoiser_part} were changed"
        + _scaled(record["scales"])
        + f". {_READS_IT}",
        *[_fenced(yaml.safe_dump(c, sort_keys=False, allow_unicode=True)) for c in record["configs"] if c],
        "The base's denoiser, before: " + ", ".join(f"{escape(n)} (SHA-256 `{digest}`)" for n, digest in hashes) + ".",
        "## Evaluation",
        *(_evaluation(adapter.result) for adapter in adapters),
    ]
    return _card(title, _header(base["name"], family, TAGS), sections)


def adapter_card(adapter: Adapter, family: ModelFamily, repository: str) -> str:
    """An adapter's card, as `model_card`, which says how to load it from the hub's `repository` (OWNER/NAME)."""
    base = {"name": family.name, "revision": adapter.base.get("revision")}
    kind = adapter.config["student"]["adapter_type"]
    if is_file(adapter.path / LORA_WEIGHT_NAME_SAFE):
        loads = f'In diffusers: `pipe.load_lora_weights("{repository}")`.'
    elif kind != "none":
        loads = f'In peft: `PeftModel.from_pretrained(pipe.{family.denoiser_part}, "{repository}")`.'
    else:
        loads = "These are whole weights, which `python -m esd_peft.merge_adapter` puts into the base."
    sections = [
        f"With this adapter {_origin(base)} no longer draws these concepts:",
        _concepts(adapter.concepts),
        f"{loads} {_RECOVERY}",
        "## How",
        f"{_method(adapter.base['version'])}. {_READS_IT}",
        _fenced(yaml.safe_dump(public_config(adapter.config), sort_keys=False, allow_unicode=True)),
        "## Evaluation",
        _evaluation(adapter.result),
    ]
    return _card(
        repository.split("/")[-1], _header(family.name, family, [*TAGS, *([kind] if kind != "none" else [])]), sections
    )


_RECOVERY = (
    "An erased concept may be recovered by fine-tuning or by learned embeddings. Most of it comes back at half the "
    "adapter's strength, and in the average of the merged and the base model. Where `negative_guidance` is above 0, its "
    "name may draw it as a negative prompt."
)
_READS_IT = "`python -m esd_peft.erase --config` reads this:"


def _card(title: str, header: str, sections: list[str]) -> str:
    return "\n\n".join([f"---\n{header}\n---", f"# {escape(title)}", *sections]).rstrip() + "\n"


def _header(base: str, family: ModelFamily, tags: list[str]) -> str:
    """Return the YAML header that the hub reads."""
    return ModelCardData(
        **base_licence(family.path),
        base_model=base if "/" in base else None,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=tags,
    ).to_yaml()


def _origin(base: dict[str, Any]) -> str:
    """The base's name, with where it is on the hub, if it came from there."""
    name, revision = base["name"], base["revision"]
    linked = f"[{escape(name)}](https://huggingface.co/{name})" if "/" in name else escape(name)
    return linked + (f" at `{revision}`" if revision else "")


def _concepts(concepts: list[str]) -> str:
    return "\n".join(f"- {escape(concept)}" for concept in concepts) or "- (the adapter does not say)"


def _method(version: str) -> str:
    return f"[ESD](https://arxiv.org/abs/2303.07345), with `esd_peft` {escape(version)}"


def base_licence(path: Path) -> dict[str, Any]:
    """`license`, `license_name` and `license_link` of the base's card, as far as it has one.

    Raises `UserError` if it cannot be read.
    """
    card, header_fields = path / "README.md", None
    if is_file(card) and inside_model(path, card):
        with reading(card), card.open("rb") as file:
            header = _HEADER.match(file.read(_LARGEST_HEADER).decode("utf-8-sig", "replace"))
        with contextlib.suppress(UnreadableError):
            header_fields = parse_yaml(header[1]) if header else None
    header_fields = header_fields if isinstance(header_fields, dict) else {}
    licence = {key: header_fields.get(key) for key in ("license", "license_name", "license_link")}
    return {
        key: value for key, value in licence.items() if isinstance(value, str) and value.isprintable() and len(value) < 500
    }


def public_config(config: dict[str, Any]) -> dict[str, Any]:
    """The config that made an adapter without what concerns one machine only: paths and devices."""
    groups = {name: group for name, group in config.items() if isinstance(group, dict)}
    kept = {
        name: {key: value for key, value in group.items() if key not in _LOCAL and value not in (None, [])}
        for name, group in groups.items()
    }
    pretrained = kept.get("pretrained", {})
    if model := pretrained.get("model"):
        pretrained["model"] = Path(model).name if Path(model).is_absolute() or exists(model) else model
    return {name: group for name, group in kept.items() if group}


def escape(text: str) -> str:
    """`text` as itself in Markdown, on one line: a concept is a prompt, which may hold anything."""
    return _MARKDOWN.sub(r"\\\1", " ".join(text.split()))


def _fenced(text: str) -> str:
    """A code block whose fence is longer than any in `text`."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}yaml\n{text.rstrip()}\n{fence}"


def _scaled(scales: list[float]) -> str:
    if all(scale == 1 for scale in scales):
        return ""
    return f" (adapters scaled by {', '.join(f'{scale:g}' for scale in scales)})"


def _evaluation(result: dict[str, Any]) -> str:
    rates = {**result.get("concepts", {}), **result.get("others", {})}
    if not rates:
        return "No rates were measured on this model: look at images before you rely on it."
    rows = [f"| {escape(name)} | {rate['before']:.1%} | {rate['after']:.1%} |" for name, rate in rates.items()]
    return "\n".join(
        ["Recognised in images of the adapter, before it was merged:", "", "| | before | after |", "|---|---|---|", *rows]
    )
