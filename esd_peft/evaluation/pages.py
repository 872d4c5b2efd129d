"""HTML pages from templates; Jinja escapes every text in them."""

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from esd_peft.io.text import printable_lines


def render(template: str, **values: Any) -> str:
    """The page that a template of this folder makes of the values."""
    loader = PackageLoader("esd_peft.evaluation", "")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return printable_lines(environment.get_template(template).render(**values))
