"""What `esd_peft.erase` trains, ready to start, for benchmarks that time its steps."""

from esd_peft import EraseConfig
from esd_peft.defaults import resolve
from esd_peft.models import open_family
from esd_peft.prompts.table import make_table
from esd_peft.runtime.profiling import PhaseProfiler
from esd_peft.training.loop import TrainingLoop
from esd_peft.training.monitor import Monitor
from esd_peft.training.objective import make_objective
from esd_peft.training.rollout import Rollout
from esd_peft.training.student import load_student
from esd_peft.training.trainer import Trainer


class Job:
    """What `esd_peft.erase` trains and on what, ready to start, several times."""

    def __init__(self, path: str, options: dict) -> None:
        given = EraseConfig(concept="circle", model=path, **options)
        family = open_family(path)
        self.config, self.prompts = resolve(given, family)
        device, dtype = self.config.runtime.torch_device, self.config.runtime.torch_dtype
        embeds = family.encode(self.prompts.texts, device, dtype)
        self.table = make_table(self.prompts, embeds)
        student, memory, seed = self.config.student, self.config.memory, self.config.training.seed
        self.student = load_student(family, student, memory, self.prompts, embeds, device, dtype, seed)
        self.rollout = Rollout(self.student, PhaseProfiler(device))

    def run(self) -> list[float]:
        """All training steps; returns the losses that were read."""
        buffer, training = self.config.buffer, self.config.training
        sampler, loss, decay = make_objective(self.rollout, self.table, self.prompts, buffer, training)
        trainer = Trainer(self.student, training, self.config.memory, decay, self.rollout.profiler)
        loop = TrainingLoop(trainer, sampler, None, Monitor(self.student, self.rollout.profiler), None)
        for batch in loop.batches():
            trainer.step(batch, loss)
        return trainer.losses
