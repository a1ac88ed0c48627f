"""The files of `deploy/`: they are valid, and fit each other."""

from pathlib import Path

import yaml

from m3runtime.config.schema import Config

DEPLOY = Path(__file__).parents[2] / "deploy"


def test_the_cluster_is_described_by_valid_files() -> None:
    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    config = Config.load(DEPLOY / "m3.yaml", {})
    assert [tier.kind for tier in config.tiers] == ["pinned", "valkey", "lance"]
    assert str(config.tiers[1].options["url"]).partition("//")[2].partition(":")[0] in services
    assert str(config.tiers[2].options["url"]).split("/")[2] == services["store"]["environment"]["S3_BUCKET"]
    for service in services.values():
        assert {"image", "build"} & service.keys()
        assert set(service.get("depends_on", ())) <= services.keys()
    assert "AWS_ENDPOINT" in services["server"]["environment"]  # a merged mapping, with the keys of the server
