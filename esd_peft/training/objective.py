"""Which objective: where its batches come from, and which loss (`esd.esd_loss`, `contrastive.contrastive_loss`)."""

from esd_peft.prompts.plan import PromptPlan
from esd_peft.prompts.table import PairTable
from esd_peft.prompts.wordings import Wordings
from esd_peft.runtime.seeds import generator
from esd_peft.training import contrastive, esd
from esd_peft.training.adversarial import AdversarialSampler
from esd_peft.training.augmented import AugmentedSampler
from esd_peft.training.batches import BatchSampler, Sampler
from esd_peft.training.options import BufferOptions, TrainingOptions
from esd_peft.training.rollout import Rollout
from esd_peft.training.work import survey_rollout


def make_objective(
    rollout: Rollout,
    table: PairTable,
    prompts: PromptPlan,
    buffer: BufferOptions,
    training: TrainingOptions,
    wordings: Wordings | None = None,
) -> tuple[Sampler, esd.Loss, float]:
    """The sampler, the loss and the weight decay that go together. Raises `UserError` if they do not fit the model."""
    draws = generator(training.seed, "bank")  # an old word for the buffer: another name would give other bits
    if training.objective == "contrastive":
        references = contrastive.make_references(rollout, prompts.concepts, training, buffer.rollout_batch_size)
        sampler: Sampler = contrastive.ReferenceSampler(rollout, table, references, training.train_batch_size, draws)
        return sampler, contrastive.contrastive_loss, contrastive.WEIGHT_DECAY
    steps = survey_rollout(buffer).num_inference_steps if training.augment_prompts else buffer.num_inference_steps
    rollout.check_timesteps(buffer.replace(num_inference_steps=steps))
    if training.augment_prompts:
        assert wordings is not None, "which --augment-prompts is about"
        sampler = AugmentedSampler(rollout, wordings, buffer, training, draws)
    elif training.robust:
        sampler = AdversarialSampler(rollout, prompts, table, buffer, training, draws)
    else:
        sampler = BatchSampler(rollout, table, buffer, training, draws)
    loss: esd.Loss = esd.esd_loss
    if training.snr_gamma is not None:
        loss = esd.min_snr_loss(loss, rollout.student.family, training.snr_gamma)
    return sampler, loss, esd.WEIGHT_DECAY
