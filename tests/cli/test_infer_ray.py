"""meta-infer --ray refuses in one line what it cannot do, before it starts Ray."""

import sys

import pytest

from meta_deploy.cli.infer import main


@pytest.fixture
def refused(bundles, small_images, capsys):
    """Run meta-infer on two images, which it refuses; gives the line."""

    def call(*options, model="detector"):
        assert main([str(small_images), "--model", str(bundles / model), *options]) == 2
        out, err = capsys.readouterr()
        assert (out, len(err.splitlines())) == ("", 1)
        return err

    return call


@pytest.mark.parametrize("module", ["ray", "pyarrow"])
def test_without_ray_it_says_what_to_install(refused, monkeypatch, module):
    monkeypatch.setitem(sys.modules, module, None)
    assert "pip install 'meta-deploy[ray]'" in refused("--ray")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--ray", "--csv", "x.csv"], "--csv does not go with --ray"),
        (["--ray", "--label-image"], "--label-image does not go with --ray"),
        (["--ray", "--rebuild"], "--rebuild does not go with --ray"),
        (["--ray", "--json", "--coco-json", "x.json"], "of --json or of --coco-json"),
        (["--ray", "--coco-json", "x.json", "--score-threshold", "0.5"], "--score-threshold"),
        (["--ray", "--coco-json", "none/x.json"], "cannot write 'none/x.json'"),
        (["--workers", "2"], "--workers is for --ray"),
        (["--part-size", "2"], "--part-size is for --ray"),
    ],
)
def test_options_that_do_not_go_together_are_refused(refused, options, told):
    assert told in refused(*options)
