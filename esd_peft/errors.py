"""The one exception for what a user can mend: its text is one sentence that names the option and the fix."""

import os
import re

_TOKEN = re.compile(r"\b(hf|hf_oauth|api_org)_[A-Za-z0-9]{20,}")  # of the hub

_LONG = 2000  # characters; more than that is a file's


class UserError(Exception):
    """Bad input. Commands print the sentence and exit with 2; Python callers catch it."""

    def __init__(self, sentence: str) -> None:
        """One line without the hub's token, whatever the names, files and libraries hold that it quotes."""
        sentence = _TOKEN.sub("***", sentence)
        if secret := os.environ.get("HF_TOKEN"):
            sentence = sentence.replace(secret, "***")
        super().__init__("".join(char if char.isprintable() else " " for char in sentence[:_LONG]))


class OutOfMemory(UserError):
    """The device has too little memory for a phase of a job (`esd_peft.runtime.profiling`)."""

    def __init__(self, phase: str, advice: str = "take smaller batches, or add --quantize nf4") -> None:
        super().__init__(f"the device ran out of memory in {phase}; {advice}")
        self.phase = phase


class UnusableImages(UserError):
    """Images show nothing that could be judged; what was trained before them is whole."""


def one_line(error: BaseException) -> str:
    """Return another library's error message on one short line; its class name if the message is empty."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def system_reason(error: BaseException) -> str:
    """Return the system's error message for a file, without error number and file name."""
    return str(getattr(error, "strerror", None) or error)


def out_of_memory(error: BaseException) -> bool:
    """Return whether the error means that the GPU or the host has too little memory.

    PyTorch has no exception class for the host or for Apple's GPUs.
    """
    import torch  # here, because commands that compute nothing can raise errors too

    messages = ("can't allocate memory", "MPS backend out of memory")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(words in str(error) for words in messages)
