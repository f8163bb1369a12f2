from datetime import UTC, datetime

import pytest
from pydantic import ValidationError

from deploy.versions import FileDigest, Manifest, VersionKind, code_version, differences, package_versions

MANIFEST = Manifest(
    version=2,
    kind=VersionKind.POLICY,
    created=datetime(2030, 1, 1, tzinfo=UTC),
    parent=1,
    settings={"ppo": {"kl_coef": 0.02, "clip": 0.2}},
    metrics={"eos_share": 0.9},
    code_version="x",
    packages={"torch": "1"},
    files={"config.json": FileDigest(bytes=2, sha256="0" * 64)},
)


def test_a_manifest_survives_json_also_where_a_metric_is_not_a_number() -> None:
    odd = MANIFEST.model_copy(update={"metrics": {"a": float("nan"), "b": float("inf"), "c": 1.5}})
    again = Manifest.model_validate_json(odd.model_dump_json())
    assert str(again.metrics) == str(odd.metrics)
    assert Manifest.model_validate_json(MANIFEST.model_dump_json()) == MANIFEST


def test_a_manifest_with_an_unknown_field_is_refused() -> None:
    with pytest.raises(ValidationError):
        Manifest.model_validate_json(MANIFEST.model_dump_json().replace('"version"', '"extra": 1, "version"', 1))


def test_differences_name_what_differs_and_nothing_else() -> None:
    other = MANIFEST.model_copy(
        update={"version": 3, "parent": 2, "settings": {"ppo": {"kl_coef": 0.05, "clip": 0.2}}, "metrics": {}}
    )
    assert differences(MANIFEST, other) == {
        "parent": (1, 2),
        "settings.ppo.kl_coef": (0.02, 0.05),
        "metrics.eos_share": (0.9, None),
    }
    assert differences(MANIFEST, MANIFEST) == {}


def test_the_software_is_named() -> None:
    assert code_version() == code_version()
    assert len(code_version().split("+")[1]) == 12
    assert "torch" in package_versions()
