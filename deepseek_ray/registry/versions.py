"""Versions of one model: register -> validate -> promote -> rollback -> history.

Aliases: champion (serves), challenger (newest registered), previous (what rollback restores).
Aliases move only here, one move at a time, and every move leaves a line in the audit table.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from urllib.parse import unquote, urlsplit

from mlflow import MlflowClient
from mlflow.artifacts import download_artifacts
from mlflow.entities.model_registry import ModelVersion, RegisteredModel
from mlflow.exceptions import MlflowException

from deepseek_ray.config import StoreConfig
from deepseek_ray.data.evidence import Check, GateDecision
from deepseek_ray.errors import GateRefusedError, ProtectedVersionError, RegistryError
from deepseek_ray.paths import RunPaths
from deepseek_ray.registry.audit import Audit, AuditEntry, AuditTransaction
from deepseek_ray.registry.package import InputSchema, Package, Probes, load_package, read_schema, write_package
from deepseek_ray.registry.pyfunc import save_flavour
from deepseek_ray.registry.tracking import Tracking

CHAMPION = "champion"
CHALLENGER = "challenger"
PREVIOUS = "previous"
TRAFFIC_TAG = "traffic"


@dataclass(frozen=True, kw_only=True)
class Lineage:
    """Where a model comes from.

    Args:
        data_digest: identity of the training rows.
        git_commit: code that trained it.
        train_start: first training day, ISO 8601.
        train_end: last training day, ISO 8601.
    """

    data_digest: str
    git_commit: str
    train_start: str
    train_end: str


@dataclass(frozen=True, kw_only=True)
class VersionLineage(Lineage):
    """A version's whole descent: from decision to data, features and code."""

    name: str
    version: str
    run_id: str
    package_digest: str
    feature_service: str
    feature_digest: str


@dataclass(frozen=True, kw_only=True)
class VersionInfo:
    """A registered version with its files at hand.

    Args:
        name: registered model.
        version: number, as text.
        run_id: MLflow run that made it.
        tags: all version tags.
        aliases: names that point to it now.
        path: local folder for ``models.load``.
        schema: its input.
    """

    name: str
    version: str
    run_id: str
    tags: Mapping[str, str]
    aliases: tuple[str, ...]
    path: Path
    schema: InputSchema

    def load(self) -> Package:
        """Verify the files, load the model and score its probes."""
        return load_package(self.path)


@dataclass(frozen=True)
class Standing:
    """Who stands where now.

    Args:
        aliases: version numbers by alias.
        traffic: the traffic policy as it was written, "" for none; see registry/traffic.py.
    """

    aliases: Mapping[str, str]
    traffic: str


class Registry:
    """All versions of one model.

    Args:
        tracking: an open store.
        name: registered model name.
    """

    def __init__(self, tracking: Tracking, name: str = "risk") -> None:
        self.tracking = tracking
        self.name = name
        self.audit = Audit(tracking.paths.root / "registry_audit.db", tracking.timeout_s)

    @classmethod
    def open(
        cls, paths: RunPaths, stores: StoreConfig | None = None, *, name: str = "risk", create: bool = True
    ) -> Registry:
        """Open the run's registry; see :meth:`Tracking.open`."""
        return cls(Tracking.open(paths, stores, experiment=name, create=create), name)

    def register(
        self,
        model_dir: Path,
        run_id: str,
        schema: InputSchema,
        lineage: Lineage,
        *,
        probes: Probes | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> VersionInfo:
        """Upload a model folder as a new version and point ``challenger`` to it.

        Args:
            model_dir: config.json and model.safetensors.
            run_id: the MLflow run that trained it.
            schema: its input.
            lineage: where it comes from.
            probes: inputs with the probabilities it must give wherever it is loaded.
            tags: more tags for the version.

        Raises:
            ModelFormatError: the folder is incomplete or does not give its probes' probabilities.
            RegistryUnavailableError: the store does not answer.
        """
        with tempfile.TemporaryDirectory(prefix="deepseek-ray-version-") as folder:
            package_dir, flavour_dir = Path(folder) / "version", Path(folder) / "flavour"
            digest = write_package(model_dir, package_dir, schema, probes)
            load_package(package_dir)
            save_flavour(package_dir, flavour_dir, schema)
            source = self._upload(flavour_dir, run_id, f"model-{digest[:12]}")
        features = {"feature_service": schema.feature_service, "feature_digest": schema.feature_digest}
        version = self._create(
            source, run_id, {**(tags or {}), **asdict(lineage), **features, "package_digest": digest}
        )
        return self.get(version)

    def validate(self, version: str) -> VersionInfo:
        """Load a version as a server would: checksums, weights, probes; tag it ``validated``.

        Raises:
            ModelFormatError: a file is altered or a probe gives another probability.
        """
        info = self.get(version)
        info.load()
        with self.tracking.guard(write=True) as client:
            client.set_model_version_tag(self.name, info.version, "validated", "true")
        return info

    def promote(self, version: str, decision: GateDecision) -> VersionInfo:
        """Make a version champion and the champion previous; a refusal is kept in the history too.

        Args:
            version: the version to promote.
            decision: what online/gate.py decided about exactly this version and today's champion.

        Raises:
            GateRefusedError: the decision refuses, or is about another model, version or champion.
            ModelFormatError: the version does not load.
        """
        number = str(self._resolve(version).version)
        if reason := self.offer(number, decision):
            raise GateRefusedError(
                f"Version {number} of {self.name!r} was not promoted: {reason}.",
                fix="decide again on fresh evidence, or train a better version",
            )
        return self.get(number)

    def offer(self, version: str, decision: GateDecision) -> str:
        """Like :meth:`promote`, but a refusal is an answer: returns why, or "" when the version is champion now."""
        if not isinstance(decision, GateDecision):
            raise TypeError(f"a promotion takes a GateDecision, got {type(decision).__name__}")
        info = self.validate(version)
        with self.audit.transaction() as audit:
            return self.settle(audit, info, decision)

    def settle(self, audit: AuditTransaction, info: VersionInfo, decision: GateDecision, *, crown: bool = True) -> str:
        """Do what a decision says about a validated version, within an open transaction.

        Args:
            audit: holds the lock of alias moves.
            info: the version.
            decision: about it and today's champion.
            crown: make it champion where nothing speaks against it; else only note the decision with the version.

        Returns:
            Why it is refused, or "".
        """
        before = self.make_good(audit)
        reason = self._refusal(info, decision, before)
        action = "refuse" if reason else "promote" if crown else "admit"
        if action != "admit":
            after = before if reason else info.version
            audit.append(self._entry(action, info.version, before, after, decision=decision.to_json(), note=reason))
        self._tag_decision(info.version, decision, action)
        if action == "promote":
            self._crown(info.version, previous=before)
        return reason

    def make_good(self, audit: AuditTransaction) -> str | None:
        """Add the line that the history lacks where a program ended between moving the champion and keeping its line.

        Returns:
            The champion now, None for none.
        """
        champion = self.version_of(CHAMPION)
        entries = audit.entries(self.name)
        before = entries[-1].champion_after if entries else None
        if champion is not None and champion != before:
            note = "noted later: whoever moved it kept no line"
            audit.append(self._entry("promote", champion, before, champion, note=note))
        return champion

    def rollback(self, note: str = "") -> VersionInfo:
        """Load ``previous``, score its probes, and only then make it champion again.

        ``previous`` then points to the champion before that one, if there was one.

        Raises:
            RegistryError: there is no previous version.
            ModelFormatError: it does not load; the champion stays.
        """
        with self.audit.transaction() as audit:
            restored, before = self.version_of(PREVIOUS), self.make_good(audit)
            if restored is None or restored == before:
                raise RegistryError(f"{self.name!r} has no previous version.", fix="promote a version instead")
            self.get(restored).load()
            older = _champion_before(audit, self.name, restored)
            audit.append(self._entry("rollback", restored, before, restored, note=note))
            self._crown(restored, previous=older if older != before and older in self.versions() else None)
        return self.get(restored)

    def history(self) -> list[AuditEntry]:
        """Promotions, refusals, rollbacks and deletions, oldest first."""
        return self.audit.entries(self.name)

    def delete_version(self, version: str) -> None:
        """Delete a version that no alias protects; MLflow alone would drop the alias silently.

        Raises:
            ProtectedVersionError: an alias points to it.
        """
        with self.audit.transaction() as audit:
            version = str(self._resolve(version).version)
            behind = [alias for alias, number in self.aliases().items() if number == version]
            if behind:
                raise ProtectedVersionError(
                    f"Version {version} of {self.name!r} stands behind {', '.join(sorted(behind))}.",
                    fix="promote another one first",
                )
            champion = self.version_of(CHAMPION)
            audit.append(self._entry("delete", version, champion, champion))
            with self.tracking.guard(write=True) as client:
                client.delete_model_version(self.name, version)

    def get(self, version: str) -> VersionInfo:
        """A version by number or alias, its files made local.

        Raises:
            RegistryError: there is no such version or alias.
        """
        found = self._resolve(version)
        path = self._local_path(found)
        aliases = tuple(sorted(alias for alias, number in self.aliases().items() if number == str(found.version)))
        return VersionInfo(
            name=self.name,
            version=str(found.version),
            run_id=str(found.run_id or ""),
            tags=dict(found.tags),
            aliases=aliases,
            path=path,
            schema=read_schema(path),
        )

    def version_of(self, alias: str) -> str | None:
        """Number behind an alias, None when it is not set; cheap enough to poll."""
        return self.aliases().get(alias)

    def aliases(self) -> dict[str, str]:
        """All aliases with their version numbers."""
        return dict(self.standing().aliases)

    def standing(self) -> Standing:
        """Aliases and traffic in one question to the store: what a server polls."""
        with self.tracking.guard() as client:
            found = _find_model(client, self.name)
        if found is None:
            return Standing({}, "")
        return Standing(
            {alias: str(number) for alias, number in found.aliases.items()}, found.tags.get(TRAFFIC_TAG, "")
        )

    def versions(self) -> list[str]:
        """Numbers of all versions, oldest first."""
        with self.tracking.guard() as client:
            found = client.search_model_versions(f"name = '{self.name}'")
        return sorted((str(item.version) for item in found), key=int)

    def lineage(self, version: str) -> VersionLineage:
        """Run, data, features and code behind a version (number or alias)."""
        found = self._resolve(version)
        known = {"name": self.name, "version": str(found.version), "run_id": str(found.run_id or "")}
        tags = {**found.tags, **known}
        return VersionLineage(**{field.name: str(tags.get(field.name, "")) for field in fields(VersionLineage)})

    def _upload(self, folder: Path, run_id: str, name: str) -> str:
        with self.tracking.guard(write=True) as client:
            client.log_artifacts(run_id, str(folder), name)
            return f"{client.get_run(run_id).info.artifact_uri}/{name}"

    def _create(self, source: str, run_id: str, tags: Mapping[str, str]) -> str:
        with self.tracking.guard(write=True) as client:
            if _find_model(client, self.name) is None:
                client.create_registered_model(self.name)
            made = client.create_model_version(
                self.name, source, run_id, tags={key: str(value) for key, value in tags.items()}
            )
            client.set_registered_model_alias(self.name, CHALLENGER, str(made.version))
        return str(made.version)

    def _refusal(self, info: VersionInfo, decision: GateDecision, champion: str | None) -> str:
        if (decision.name, decision.version) != (self.name, info.version):
            return f"the decision is about version {decision.version} of {decision.name!r}"
        if info.version == champion:
            return "it is the champion already"
        if decision.champion_version != champion:
            return f"it was compared with champion {decision.champion_version}, but the champion is {champion}"
        return "; ".join(str(check) for check in decision.failed)

    def _crown(self, version: str, *, previous: str | None) -> None:
        # previous first: a crash in between leaves the old champion serving
        with self.tracking.guard(write=True) as client:
            if previous is not None and previous != version:
                client.set_registered_model_alias(self.name, PREVIOUS, previous)
            client.set_registered_model_alias(self.name, CHAMPION, version)
            aliases = self.aliases()
            for alias in (CHALLENGER, PREVIOUS):
                if aliases.get(alias) == version:
                    client.delete_registered_model_alias(self.name, alias)

    def _tag_decision(self, version: str, decision: GateDecision, action: str) -> None:
        tags = {"gate.action": action, "gate.decision": decision.to_json()}
        tags.update({f"gate.{check.name}": _short(check) for check in decision.checks})
        with self.tracking.guard(write=True) as client:
            for key, value in tags.items():
                client.set_model_version_tag(self.name, version, key, value)

    def _entry(
        self, action: str, version: str, before: str | None, after: str | None, *, decision: str = "{}", note: str = ""
    ) -> AuditEntry:
        return AuditEntry(
            name=self.name,
            action=action,
            version=version,
            champion_before=before,
            champion_after=after,
            decision=decision,
            note=note,
        )

    def _resolve(self, version: str) -> ModelVersion:
        number = version if version.isdigit() else self.version_of(version)
        if number is None:
            raise RegistryError(
                f"{self.name!r} has no version or alias {version!r}.",
                fix="see `deepseek-ray registry history` for what there is",
            )
        with self.tracking.guard() as client:
            found = _find_version(client, self.name, number)
        if found is None:
            known = self.versions()
            raise RegistryError(
                f"{self.name!r} has no version {number}; it has {', '.join(known[-10:]) or 'none'}"
                f"{' and older ones' if len(known) > 10 else ''}.",
                fix="name one of these, or an alias",
            )
        return found

    def _local_path(self, found: ModelVersion) -> Path:
        parts = urlsplit(str(found.source))
        if parts.scheme in ("", "file"):
            return Path(unquote(parts.path)) / "data" / "version"
        cached = self.tracking.paths.root / "model_cache" / self.name / str(found.version)
        if not cached.exists():
            self._download(str(found.source), cached)
        return cached / "data" / "version"

    def _download(self, source: str, target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder, self.tracking.guard():
            got = download_artifacts(artifact_uri=source, dst_path=folder, tracking_uri=self.tracking.uri)
            try:
                os.rename(got, target)
            except OSError:  # another process was faster
                if not target.exists():
                    raise


def _find_model(client: MlflowClient, name: str) -> RegisteredModel | None:
    try:
        return client.get_registered_model(name)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise


def _find_version(client: MlflowClient, name: str, number: str) -> ModelVersion | None:
    if len(number) > 9:  # beyond what a store counts to
        return None
    try:
        return client.get_model_version(name, number)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise


def _champion_before(audit: AuditTransaction, name: str, version: str) -> str | None:
    """Champion that this version replaced when it was last promoted."""
    for entry in reversed(audit.entries(name)):
        if entry.action == "promote" and entry.version == version:
            return entry.champion_before
    return None


def _short(check: Check) -> str:
    return f"{'passed' if check.passed else 'failed'}: {check}"
