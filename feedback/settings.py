"""Settings: one TOML file with a table per package, read once in ``__main__`` and passed as arguments.

Precedence: command line > environment (``INSTRUCTLOOP_SERVE__PORT``) > TOML > default. The file is
named by ``INSTRUCTLOOP_SETTINGS``; without it, ``./instructloop.toml`` where that exists. ``state`` and
``redis_url`` stand at the top of the file, because every package needs them.
"""

import os
import tomllib
from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic import Field, ValidationError
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from feedback.errors import FeedbackError

TABLES = ("serve", "feedback", "train", "deploy")
"""The tables a settings file may have: one per package."""


class SettingsError(FeedbackError):
    """A settings file or value that cannot be used; the message names the field."""


class TableSettings(BaseSettings):
    """One table of the settings file. Subclasses name it in ``table``; an empty name is the file's top level."""

    table: ClassVar[str] = ""
    model_config = SettingsConfigDict(frozen=True, extra="forbid", env_nested_delimiter="__")

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Command line (init) first, then the environment, then the TOML table."""
        return init_settings, env_settings, _TomlTable(settings_cls, cls.table)

    @classmethod
    def load(cls, **command_line: Any) -> Self:
        """Read the settings; arguments that are None were not given. Raises SettingsError."""
        given = {name: value for name, value in command_line.items() if value is not None}
        cls._refuse_unknown_environment()
        try:
            return cls(**given)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join([cls.table or "top level", *(str(part) for part in first["loc"])])
            raise SettingsError(f"settings: {where}: {first['msg']}") from error

    @classmethod
    def _refuse_unknown_environment(cls) -> None:
        if not cls.table:  # the top level shares its prefix with the tables and with INSTRUCTLOOP_SETTINGS
            return
        prefix = f"INSTRUCTLOOP_{cls.table}__".upper()
        for name in os.environ:
            if name.upper().startswith(prefix):
                field = name[len(prefix) :].lower().split("__")[0]
                if field not in cls.model_fields:
                    raise SettingsError(f"settings: the environment sets {name}, but {cls.table} has no {field}")


class _TomlTable(PydanticBaseSettingsSource):
    def __init__(self, settings_cls: type[BaseSettings], table: str) -> None:
        super().__init__(settings_cls)
        self._values = _read_table(table)

    def get_field_value(self, field: Any, field_name: str) -> tuple[Any, str, bool]:
        return self._values.get(field_name), field_name, False

    def __call__(self) -> dict[str, Any]:
        return self._values


def _read_table(table: str) -> dict[str, Any]:
    named = os.environ.get("INSTRUCTLOOP_SETTINGS")
    path = Path(named or "instructloop.toml")
    if not path.exists():
        if named:
            raise SettingsError(f"INSTRUCTLOOP_SETTINGS names {named}, which does not exist")
        return {}
    try:
        document = tomllib.loads(path.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path}: {error}") from error
    if unknown := sorted(name for name, value in document.items() if isinstance(value, dict) and name not in TABLES):
        raise SettingsError(f"{path}: unknown table [{unknown[0]}]; the tables are {', '.join(TABLES)}")
    if not table:
        return {name: value for name, value in document.items() if not isinstance(value, dict)}
    values = document.get(table, {})
    if not isinstance(values, dict):
        raise SettingsError(f"{path}: [{table}] must be a table")
    return values


class LoopSettings(TableSettings):
    """Where the loop keeps its state; shared by every package."""

    model_config = SettingsConfigDict(env_prefix="INSTRUCTLOOP_")
    state: Path = Field(Path("state"), description="directory that holds Redis files, versions and runs")
    redis_url: str | None = Field(
        None, description="redis://, rediss:// or unix:// of a real Redis; None starts or joins the embedded one"
    )


class FeedbackSettings(TableSettings):
    """How feedback is kept."""

    table = "feedback"
    model_config = SettingsConfigDict(env_prefix="INSTRUCTLOOP_FEEDBACK__")
    completion_ttl_seconds: int = Field(
        7 * 24 * 3600, gt=0, description="how long an unstored completion can be named by feedback; ours"
    )
    idempotency_ttl_seconds: int = Field(72 * 3600, gt=0, description="how long a replay answers as the first; ours")
    task_ttl_seconds: int = Field(24 * 3600, gt=0, description="how long a blind task can be answered; ours")
    socket_timeout_seconds: float = Field(1.0, gt=0, description="longest wait for Redis before answering 503; ours")
    max_connections: int = Field(32, gt=0, description="connections per process; ours")
    pool_prompts: int = Field(10_000, gt=0, description="prompts kept to be shown to labelers; ours")
    golden_share: float = Field(
        0.05, ge=0, le=0.5, description="of the tasks whose prompt the server picks, with a known answer; ours"
    )
    repeat_share: float = Field(
        0.05, ge=0, le=0.5, description="of these tasks, the labeler's own earlier ones in reverse; ours"
    )
    labeler_memory_seconds: int = Field(
        90 * 24 * 3600, gt=0, description="how long after the last task a labeler gets no prompt again; ours"
    )
