"""What a container allows is what there is."""

from atlasvid_cli import machine


def test_a_containers_limit_bounds_the_memory(monkeypatch, tmp_path):
    whole = machine.available_ram()
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    for name, text in {"max": "max", "current": "5000", "stat": "anon 3000\ninactive_file 1000"}.items():
        (tmp_path / f"memory.{name}").write_text(text)
    assert machine.available_ram() > whole / 2  # no limit
    (tmp_path / "memory.max").write_text("9000")
    assert machine.available_ram() == 9000 - 5000 + 1000
