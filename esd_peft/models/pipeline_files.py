"""The files that a merged model gets: those that `from_pretrained` reads of each part, and no others.

A model directory may hold anything: other copies of the weights, in which the concept still is, and links to anywhere.
"""

import json
from collections.abc import Iterator
from pathlib import Path

from esd_peft.errors import UserError
from esd_peft.io.paths import exists, is_dir, is_file, why_closed
from esd_peft.io.tensors import copy_with_sha256
from esd_peft.io.text import UnreadableError, read_json
from esd_peft.models import ModelFamily
from esd_peft.models.conversion import INDEX
from esd_peft.models.sources import inside_model
from esd_peft.models.weight_files import PICKLED, StoredWeights, find_weights, library_of

# of tokenizers, schedulers, processors and models
SETTINGS = (
    "config.json", "generation_config.json", "scheduler_config.json", "preprocessor_config.json", "processor_config.json",
    "image_processor_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "spiece.model", "sentencepiece.bpe.model", "tokenizer.model",
    "chat_template.jinja", "chat_template.json",
)  # fmt: skip
LICENCES = "LICENSE*"
_WITHOUT_WEIGHTS = ("Tokenizer", "Scheduler", "Processor", "FeatureExtractor")  # in the names of classes


def copy_pipeline(family: ModelFamily, target: Path) -> Iterator[tuple[str, str, Path]]:
    """Copy a pipeline under its plain names.

    Yields each file of the denoiser as soon as it is there: the base's name for it, the hash of the base's, the copy.
    Raises `UserError` for a file that lies outside the directory, and for JSON that is none.
    """
    root = family.path
    licences = [file for file in root.glob(LICENCES) if file.is_symlink() or not is_dir(file)]
    for file in [root / INDEX, *licences]:
        _copy(family, file, target / file.name)
    for name in parts_of(family):
        copy = target / name
        if reason := why_closed(root / name):  # otherwise it would look empty
            raise UserError(f"{family.option} {root / name} cannot be read ({reason}); restore your right to read it")
        copy.mkdir()
        settings, weights = part_files(family, name)
        for file in settings:
            _copy(family, file, copy / file.name)
        if weights is None:
            continue
        for file in weights.files:
            digest = _copy(family, file, copy / weights.plain_name(file))
            if name == family.denoiser_part:
                yield file.name, digest, copy / weights.plain_name(file)
        if weights.index:
            _copy_index(weights, weights.index, copy)


def parts_of(family: ModelFamily) -> list[str]:
    """The parts that the pipeline comes with, whether they are read here or not (a safety checker, for example)."""
    named = [name for name, part in family.index.items() if isinstance(part, list) and part[0] is not None]
    return [name for name in named if is_dir(family.path / name)]


def part_files(family: ModelFamily, name: str) -> tuple[list[Path], StoredWeights | None]:
    """The settings and the weights that `from_pretrained` reads of a part; pickles of a part that is not read here.

    Raises `UserError` as `Part.weights` does.
    """
    folder, entry = family.path / name, family.index[name]
    settings = [folder / setting for setting in SETTINGS if exists(folder / setting)]
    if any(kind in str(entry[1]) for kind in _WITHOUT_WEIGHTS):
        return settings, None
    if name in family.used:
        return settings, family.part(name).weights
    library = library_of(entry)
    safe = find_weights(folder, library, family.variant)
    return settings, safe or find_weights(folder, library, family.variant, PICKLED)


def _copy(family: ModelFamily, file: Path, copy: Path) -> str:
    """Copy a file that belongs to the model; its hash."""
    if not inside_model(family.path, file) or not is_file(file):
        raise UserError(f"{family.option} {family.path}: {file.name} is no file of that directory; put it there")
    if file.suffix == ".json":
        try:
            read_json(file)
        except UnreadableError as error:
            raise UserError(f"{family.option} {file} is damaged ({error}); restore it") from None
    return copy_with_sha256(file, copy)


def _copy_index(weights: StoredWeights, index: Path, folder: Path) -> None:
    shards = read_json(index)
    shards["weight_map"] = {key: weights.plain_name(Path(file)) for key, file in shards["weight_map"].items()}
    (folder / weights.plain_name(index)).write_text(json.dumps(shards, indent=2) + "\n", encoding="utf-8")
