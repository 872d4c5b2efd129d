"""Amounts as people write them."""

import re


def parse_bytes(text: str) -> int:
    """`12GiB`, `12 GB`, `800M` (MiB), `1000000`: bytes. Raises `ValueError` for anything else."""
    found = re.fullmatch(r"\s*(\d{1,15}(?:\.\d{1,15})?)\s*([kmgt]?)(i?b)?\s*", text, re.IGNORECASE | re.ASCII)
    if found is None or float(found[1]) <= 0:
        raise ValueError(f"{text!r} is no amount of memory; write 12GiB, for example")
    step = 1000 if (found[3] or "").lower() == "b" else 1024
    return int(float(found[1]) * step ** " kmgt".index(found[2].lower() or " "))
