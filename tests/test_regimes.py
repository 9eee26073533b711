"""The arms of bench_regimes.py: commands that the stages take, on records that fit their regime."""
import pytest

import data_prep
import grpo
import sft
import bench_regimes


@pytest.mark.parametrize("regime", bench_regimes.REGIMES)
def test_arms_of_a_regime_are_accepted(regime, tiny, group, tmp_path, monkeypatch):
    """Each is a command that its stage takes; their records are read back as they were written."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data/mini").symlink_to(tiny.mini)
    for stage in ("sft", "grpo"):
        (tmp_path / stage).mkdir()
        (tmp_path / stage / "wall_time").write_text("1.5")
        (tmp_path / stage / "metrics.jsonl").write_text('{"step": 1}\n' * 20)
    monkeypatch.setattr(bench_regimes, "ROOT", tmp_path)
    monkeypatch.setattr(bench_regimes, "start_of", lambda seed, stage: stage)
    asked = []
    monkeypatch.setattr(bench_regimes, "run", lambda out, *command, **how: asked.append(command))
    arms = bench_regimes.REGIMES[regime][0](0, tmp_path)
    assert next(iter(arms)) == "GRPO" and len(arms) > 1
    for stage, *flags in [*asked, *(command for _, command in arms.values() if command)]:
        cfg = data_prep.parse_config({"sft.py": sft, "grpo.py": grpo}[stage].Config, map(str, flags))
        if stage == "grpo.py":
            grpo.check(cfg)
    for path in tmp_path.glob("*.jsonl"):
        assert len(data_prep.read_records(path)) == 24
