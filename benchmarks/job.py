"""A training of `esd_peft.erase`, ready to start, for benchmarks that time its steps."""

from esd_peft import EraseConfig
from esd_peft.erasure.defaults import resolve
from esd_peft.models import open_family
from esd_peft.models.text_encoding import TextEncoder
from esd_peft.options.training import BY_PROMPTS
from esd_peft.prompts.augmentation import amounts, augment_prompts
from esd_peft.prompts.table import make_table
from esd_peft.runtime.profiling import PhaseProfiler
from esd_peft.training.loop import TrainingLoop
from esd_peft.training.method import Materials, make_method
from esd_peft.training.monitor import Monitor
from esd_peft.training.rollout import Rollout
from esd_peft.training.student import load_student
from esd_peft.training.trainer import Trainer


class Job:
    """A training of `esd_peft.erase` that can be started several times."""

    def __init__(self, path: str, options: dict) -> None:
        given = EraseConfig(concept="circle", model=path, **options)
        family = open_family(path)
        self.config, self.plan = resolve(given, family)
        student, memory, training = self.config.student, self.config.memory, self.config.training
        device, dtype = self.config.runtime.torch_device, self.config.runtime.torch_dtype
        self.prompts = None
        with TextEncoder(family, device, dtype) as encoder:
            embeds = {name: value.to(device) for name, value in encoder.encode(self.plan.texts).items()}
            if training.method in BY_PROMPTS:
                self.prompts = augment_prompts(encoder, self.plan, training.seed, amounts(training.method))
        self.pairs = make_table(self.plan, embeds)
        self.student = load_student(family, student, memory, self.plan, embeds, device, dtype, training.seed)
        self.rollout = Rollout(self.student, PhaseProfiler(device))

    def run(self) -> list[float]:
        """Run all training steps; return the losses."""
        buffer, training, profiler = self.config.buffer, self.config.training, self.rollout.profiler
        method = make_method(Materials(self.rollout, self.pairs, self.prompts, self.plan.concepts, buffer, training))
        trainer = Trainer(method, training, self.config.memory, profiler)
        loop = TrainingLoop(trainer, method.source, Monitor(self.student, profiler), None)
        for batch in loop.batches():
            trainer.step(batch)
        return trainer.losses
