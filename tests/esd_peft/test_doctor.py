"""What `python -m esd_peft.doctor` says of a model and of this machine."""

import subprocess
import sys

import pytest
import torch

from esd_peft import UserError, doctor
from esd_peft.doctor import DoctorConfig, examine
from families import save_family


def said(model):
    return "\n".join(examine(DoctorConfig(model=str(model))))


def test_the_method_is_the_one_that_suits_the_pipeline():
    text = said("emoji")
    assert f"torch {torch.__version__}" in text and "bitsandbytes" in text
    assert "the embedded emoji pipeline: StableDiffusion" in text and "of 6.9 M parameters" in text
    assert "--method layers --max-train-steps 200 --scope esd-x-ff" in text
    assert "--method trajectories --max-train-steps 40 --scope esd-x-strict" in said("shapes")


def test_what_fits_which_card_and_what_does_not(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "CARDS", {"a chip": "40KiB", "12 GB": "11GiB"})
    text = said(save_family("flux dev", tmp_path / "model"))
    assert "Flux, FluxPipeline; FluxTransformer2DModel" in text
    small, large = text.splitlines()[-2:]
    assert small.startswith("  a chip does not fit: --memory-budget 0.0 MiB is")
    assert large.startswith("  12 GB") and "side by side" in large


def test_a_model_that_is_not_there_is_said_at_once():
    with pytest.raises(UserError, match="MODEL nowhere"):
        said("nowhere")
    run = subprocess.run([sys.executable, "-m", "esd_peft.doctor", "nowhere"], capture_output=True, text=True, check=False)
    assert run.returncode == 2 and "error: MODEL nowhere" in run.stderr
    assert run.stdout.startswith("packages"), "what is installed is said in any case"
