import re
from pathlib import Path

from atlasvid_cli import cli, options
from atlasvid_cli.presets import preset_names
from atlasvid_cli.video import CODECS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_no_number_is_left_to_be_filled_in():
    for page in (ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("*.md")):
        assert not re.search(r"@[A-Z]+@", page.read_text()), page


def test_links_between_documents_lead_somewhere():
    for page in (ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_every_command_is_in_the_readme():
    for command in cli.app.registered_commands:
        assert f"atlasvid {command.callback.__name__}" in README


def test_every_codec_and_preset_is_named():
    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert all(name in README for name in preset_names())
    assert all(codec in (README + changelog).lower() for codec in ("h.264", "hevc", "av1", "prores", "ffv1"))
    help_text = options.CodecName.__metadata__[0].help
    assert all(codec in help_text for codec in CODECS)


def test_modules_are_in_the_annotated_tree():
    tree = (ROOT / "docs" / "DEVELOPING.md").read_text().split("```")[1]
    assert tree.strip().startswith("atlasvid_cli/")
    words = set(tree.split())
    modules = {path.stem for path in (ROOT / "atlasvid_cli").glob("[!_]*.py")}
    assert {m for m in modules if not m.startswith("train_")} <= words
