"""The model that the speed of a merge is measured with."""

from esd_peft.models import open_family
from esd_peft.models.dry_run import check_model
from merge_speed import make_adapter, make_model


def test_it_passes_the_checks_of_a_merge(tmp_path):
    shards = make_model(tmp_path / "model", gib=0.05, width=32, shard_gib=2)
    check_model(open_family(str(tmp_path / "model")), weights=True)
    assert len(shards) == 1
    assert make_adapter(tmp_path / "adapter", tmp_path / "model", "esd-x-strict", 2) > 10
