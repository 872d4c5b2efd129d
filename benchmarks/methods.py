"""The rows of `erasure.py`: options of `esd_peft.erase`, a peer's closed form, or several erasures one after the other."""

import json
import subprocess
from pathlib import Path

import yaml

RECIPES = Path(__file__).parents[1] / "recipes"
# eight things with close neighbours, one name of two words, two styles, and an implicit concept
CONCEPTS = (
    "fox", "tiger", "tangerine", "violin", "rose", "taxi", "owl", "soccer ball", "red apple", "ink", "blob",
    "watermark",
)  # fmt: skip
TWENTY = (
    "fox", "tiger", "tangerine", "violin", "rose", "taxi", "owl", "soccer ball", "red apple", "penguin", "frog", "banana",
    "hamburger", "rocket", "volcano", "snowman", "drum", "crown", "hammer", "ghost",
)  # fmt: skip

# names of two words, which share a word with another thing's name
TWO_WORDS = (
    "green apple", "tropical fish", "palm tree", "hot dog", "rice ball", "fried shrimp", "police car", "racing car",
    "christmas tree", "billiard ball",
)  # fmt: skip
# random.Random(20261201).sample(sorted(NAMES without all concepts above, lemon and dolphin), 20): no setting has seen them
FRESH = (
    "cheese", "duck", "cherry blossom", "dove", "cookie", "chocolate", "birthday cake", "bouquet", "doughnut", "cat",
    "hamster", "baseball", "motorcycle", "cloud", "strawberry", "tie", "bus", "glasses", "sailboat", "spider",
)  # fmt: skip


def recipe(name: str) -> dict:
    """The options of `recipes/NAME.yaml`, without their groups."""
    groups = yaml.safe_load((RECIPES / f"{name}.yaml").read_text(encoding="utf-8"))
    return {option: value for group in groups.values() for option, value in group.items()}


# the peers' procedures, for as many steps as the authors' scripts take
_PAPER, _AUTHORS, _LECO = (recipe(name) | {"max_train_steps": 200} for name in ("paper", "authors", "leco"))
_SPM = {
    "method": "trajectories",
    "scope": "full",
    "rank": 1,
    "alpha": 1.0,
    "closed_form": False,
    "max_train_steps": 200,
    "preservation_ratio": 0.5,
}
# Their published rates are for Stable Diffusion. Three are tried here (results/peer_rates.md).
PEER_RATES: dict[str, dict] = {
    f"{name}, {rate:g}": peer | {"learning_rate": rate}
    for name, peer in (("paper", _PAPER), ("authors' scripts", _AUTHORS), ("LECO", _LECO), ("SPM-like", _SPM))
    for rate in (1e-4, 3e-4, 1e-3)
}
CLOSED: dict[str, dict] = {
    "UCE, current": {"closed_form_of": "uce", "form": "current"},
    "UCE, current, expanded": {"closed_form_of": "uce", "form": "current", "expand": True},
    "UCE, current, expanded, retain": {"closed_form_of": "uce", "form": "current", "expand": True, "retain": True},
    "UCE, old": {"closed_form_of": "uce", "form": "old"},
    "UCE, old, expanded": {"closed_form_of": "uce", "form": "old", "expand": True},
    "UCE, old, expanded, retain": {"closed_form_of": "uce", "form": "old", "expand": True, "retain": True},
    "SPEED": {"closed_form_of": "speed"},
}
# the two best rates here: one leaves least, the other damages least
TRAINED: dict[str, dict] = {
    name: PEER_RATES[name]
    for name in (
        "paper, 0.0001", "paper, 0.0003", "authors' scripts, 0.0001", "authors' scripts, 0.001",
        "LECO, 0.0003", "LECO, 0.001", "SPM-like, 0.001",
    )
}  # fmt: skip
OURS: dict[str, dict] = {
    "ours": {},
    # the vocabulary lacks the measured neighbours and unrelated words: none of them can be preserved by name
    "ours, vocabulary withheld": {"withheld": True},
    "ours, denoiser": {"method": "denoiser"},
    "ours, denoiser, vocabulary withheld": {"method": "denoiser", "withheld": True},
    "ours, trajectories": {"method": "trajectories"},
}
# the guided target at η 0: the base, given the same prompts without the concept's name
TARGET: dict[str, dict] = {"base, prompted without the concept": {"without_concept": True}}
PROCEDURES: dict[str, dict] = OURS | CLOSED | TRAINED | TARGET
CLAIMS: dict[str, dict] = {
    "five at once": {"concept": list(TWENTY[:5])},
    "twenty at once": {"concept": list(TWENTY)},
    "four in sequence": {"sequence": list(TWENTY[:4])},
    "ink from fox": {"concept": "ink", "erase_from": "fox"},
    "glossy from owl": {"concept": "glossy", "erase_from": "owl"},
    "fox to owl": {"concept": "fox", "map_to": "owl"},
    "fox to owl, eta 0": {"concept": "fox", "map_to": "owl", "negative_guidance": 0},
    "fox to owl, eta 1": {"concept": "fox", "map_to": "owl", "negative_guidance": 1},
    # an implicit concept, and what the same option costs a thing's neighbours
    "fox, unprompted guidance 3": {"concept": "fox", "unprompted_guidance": 3},
    "watermark, unprompted guidance 3": {"concept": "watermark", "unprompted_guidance": 3},
}
# rates of an implicit concept need many images; with --prompt-groups implicit no others are drawn
IMPLICIT: dict[str, dict] = {
    "default": {},
    "unprompted guidance 1": {"unprompted_guidance": 1},
    "unprompted guidance 3": {"unprompted_guidance": 3},
    "unprompted guidance 3, trajectories": {"unprompted_guidance": 3, "method": "trajectories"},
}
SWEEP: dict[str, dict] = {
    "default": {},
    "esd-x": {"scope": "esd-x"},
    "esd-x-strict": {"scope": "esd-x-strict"},
    "trajectories": {"method": "trajectories"},
    "100 steps": {"max_train_steps": 100},
    "400 steps": {"max_train_steps": 400},
    "800 steps": {"max_train_steps": 800},
    "rank 4": {"rank": 4},
    "rank 32": {"rank": 32},
    "no adapter": {"adapter_type": "none"},
    "eta 0": {"negative_guidance": 0},
    "eta 0.5": {"negative_guidance": 0.5},
    "eta 2": {"negative_guidance": 2},
    "bare prompt": {"prompt_templates": "bare"},
}
SHAPES = ("triangle", "heart", "blue", "dotted")  # concepts of the small pipelines of suite families
FAMILIES: dict[str, dict] = {
    "denoiser": {"method": "denoiser"},
    "denoiser, vocabulary withheld": {"method": "denoiser", "withheld": True},
    "trajectories": {},  # the default of pipelines with so few words
    "layers": {"method": "layers"},  # U-Nets only
}


def families(folder: Path) -> dict[str, dict]:
    """Return the rows of suite families: each method on each pipeline that `train_families.py` wrote to `folder`."""
    kinds = {path.stem: path.with_suffix("") for path in sorted(folder.glob("*.json"))}
    rows = {}
    for kind, path in kinds.items():
        trained = json.loads(path.with_suffix(".json").read_text())
        pipeline = {"model": str(path), "trained": trained["denoiser_sha256"]} | trained["drawing"]
        for name, options in FAMILIES.items():
            if options.get("method") == "layers" and not (path / "unet").is_dir():
                continue
            rows[f"{kind}, {name}"] = pipeline | options
    return rows


# the peers' original code at the rates of our copies, to check the copies
SCRIPTS: dict[str, dict] = {
    "authors' scripts, original code": {"script_of": "erasing", "learning_rate": 1e-3},
    "LECO, original code": {"script_of": "LECO", "learning_rate": 1e-3},
}


def commit_of(repository: str, checkouts: Path) -> str:
    """Return the commit that is checked out. Raises `SystemExit` if there is no checkout."""
    folder = checkouts / repository
    if not (folder / ".git").exists():
        raise SystemExit(f"error: --checkouts {checkouts} has no {repository}; clone it there first")
    done = subprocess.run(["git", "-C", str(folder), "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def scripts(checkouts: Path) -> dict[str, dict]:
    """Return the rows of suite scripts, with the commits of the repositories in `checkouts`, and our copies."""
    copies = {name: PEER_RATES[name] for name in ("authors' scripts, 0.001", "LECO, 0.001")}
    return {name: row | {"commit": commit_of(row["script_of"], checkouts)} for name, row in SCRIPTS.items()} | copies


# concepts of suites that do not have those of CONCEPTS
OWN_CONCEPTS = {"families": SHAPES, "two-words": TWO_WORDS, "fresh": FRESH}
SUITES: dict[str, dict] = {
    "two-words": {"default": {}},
    "fresh": {"default": {}},
    "scripts": SCRIPTS,
    "procedures": PROCEDURES,
    "peer-rates": PEER_RATES,
    "claims": CLAIMS,
    "sweep": SWEEP,
    "implicit": IMPLICIT,
    "families": FAMILIES,
}
