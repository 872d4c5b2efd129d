"""Every prompt of a run, encoded before the denoiser is loaded."""

from dataclasses import dataclass

from esd_peft.erasure.session import Session
from esd_peft.evaluation.timeline import FOLDER, Timeline
from esd_peft.evaluation.validation import FEW_STEPS, ValidationSampler
from esd_peft.io.paths import is_dir
from esd_peft.io.terminal import say
from esd_peft.models import PromptEmbeds
from esd_peft.models.sampling import encode_with
from esd_peft.models.text_encoding import TextEncoder
from esd_peft.options.erase import EraseConfig
from esd_peft.options.training import BY_PROMPTS
from esd_peft.prompts.augmentation import PromptTable, amounts, augment_prompts
from esd_peft.prompts.table import PairTable, check_distinct, make_table
from esd_peft.training.diagnosis import Probes, choose_probes


@dataclass
class EncodedRun:
    """Every prompt of a run, encoded."""

    plan: PromptEmbeds  # of the plan's texts, on the device
    pairs: PairTable
    table: PromptTable | None  # many prompts, for the methods that learn from them
    probes: Probes | None  # none without images: the diagnosis draws, too
    validation: ValidationSampler | None
    timeline: Timeline | None


def encode_prompts(config: EraseConfig, session: Session, encoder: TextEncoder) -> EncodedRun:
    """Make the run's prompts and encode them, by text encoders that are loaded once."""
    plan, training, validation = session.prompts, config.training, config.validation
    embeds = {name: value.to(encoder.device) for name, value in encoder.encode(plan.texts).items()}
    check_distinct(plan, embeds)
    table = None
    if training.method in BY_PROMPTS:
        table = augment_prompts(encoder, plan, training.seed, amounts(training.method))
    probes = None
    if validation.num_validation_images:
        probes = choose_probes(session.family, plan, table, training.seed)
        probes.texts.add(probes.all, encoder.encode(probes.all))
    images, side_by_side = validation.num_validation_images, config.buffer.rollout_batch_size
    sampler = None
    if images:
        steps = FEW_STEPS if session.family.world else None
        sampler = ValidationSampler(encoder, plan.concepts, images, side_by_side, training.seed, plan.user_preserved, steps)
    timeline = make_timeline(config, session, encoder)
    return EncodedRun(embeds, make_table(plan, embeds), table, probes, sampler, timeline)


def make_timeline(config: EraseConfig, session: Session, encoder: TextEncoder) -> Timeline | None:
    """The images of `--validation-prompt`, its prompts encoded; a run that is resumed goes on with those it has."""
    checkpoints, prompts, seed = session.checkpoints, config.validation.validation_prompt, config.training.seed
    if checkpoints is None or not (prompts or (config.checkpoint.resume and is_dir(checkpoints.folder / FOLDER))):
        return None
    images, side_by_side = config.validation.num_validation_images, config.buffer.rollout_batch_size
    title = f"Erasing {', '.join(session.prompts.concepts)}"
    encoded = encode_with(encoder, prompts) if prompts else None
    timeline = Timeline(checkpoints.folder / FOLDER, prompts, images, seed, side_by_side, encoded, title)
    timeline.open(checkpoints.step if config.checkpoint.resume else None)
    say(f"images of --validation-prompt as it trains: {timeline.page}")
    return timeline
