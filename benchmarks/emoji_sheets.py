"""Render the sheets of `drawings/`, one style a file. Needs resvg-py and the packages of `SOURCES`.

    npm pack @iconify-json/noto @iconify-json/noto-v1 @iconify-json/twemoji @iconify-json/fluent-emoji \\
        @iconify-json/fluent-emoji-high-contrast
    python benchmarks/emoji_sheets.py --packages DIR    # which holds the unpacked folders, one a package

The sheets are committed, so nobody else needs this. Their licences are in `NOTICE`.
"""

import io
import json
from pathlib import Path
from typing import Any

from PIL import Image

from esd_peft.errors import UserError
from esd_peft.io.paths import is_file
from esd_peft.options.base import Options
from esd_peft.options.command_line import parse, run_command
from esd_peft.worlds.emoji.pictures import COLUMNS, PIXELS, SHEETS
from esd_peft.worlds.emoji.vocabulary import STYLES, THINGS

SOURCES = {
    "soft": "noto",
    "blob": "noto-v1",
    "flat": "twemoji",
    "glossy": "fluent-emoji",
    "ink": "fluent-emoji-high-contrast",
}


class SheetsConfig(Options):
    """Render the pictures of the emoji world from Iconify's packages."""

    packages: Path
    """The directory of the unpacked npm packages: its folders are named as the packages, without the scope."""


def draw(icons: dict[str, Any], name: str) -> Image.Image:
    """One icon of a package as an RGBA image of `PIXELS` a side; its size does not change its place in the view box."""
    import resvg_py

    while name not in icons["icons"]:
        name = icons["aliases"][name]["parent"]
    icon = icons["icons"][name]
    width, height = (icon.get(side, icons.get(side, 16)) for side in ("width", "height"))
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{icon.get("left", 0)} {icon.get("top", 0)} {width} {height}" width="{2 * PIXELS}" height="{2 * PIXELS}">'
        f"{icon['body'].replace('currentColor', '#000')}</svg>"
    )
    drawn = Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg, skip_system_fonts=True))))
    return drawn.convert("RGBa").resize((PIXELS, PIXELS), Image.Resampling.BOX).convert("RGBA")


def main() -> None:
    """The command line."""
    config = parse(SheetsConfig, "python benchmarks/emoji_sheets.py")
    SHEETS.mkdir(exist_ok=True)
    for style in STYLES:
        file = config.packages / SOURCES[style] / "icons.json"
        if not is_file(file):
            raise UserError(f"--packages {config.packages} has no {SOURCES[style]}/icons.json; unpack that package there")
        icons = json.loads(file.read_text(encoding="utf-8"))
        sheet = Image.new("RGBA", (COLUMNS * PIXELS, -(-len(THINGS) // COLUMNS) * PIXELS))
        for i, thing in enumerate(THINGS.values()):
            sheet.paste(draw(icons, thing.icon), (i % COLUMNS * PIXELS, i // COLUMNS * PIXELS))
        sheet.save(SHEETS / f"{style}.png", optimize=True)


if __name__ == "__main__":
    run_command(main)
