"""The files of docs/deploy: each is held to its schema or its own tool, and every command composes."""

import json
import os
import re
import shlex
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from ray_auditor.__main__ import config_dir, to_overrides
from ray_auditor.config import AuditConfig, Verb, register_schemas
from ray_auditor.report.finding import EXIT_FAILED

DEPLOY = Path(__file__).resolve().parent.parent / "docs" / "deploy"
KUBERNETES = "1.35.0"
FILES = sorted(path for path in DEPLOY.rglob("*") if path.is_file() and path.suffix not in (".md", ".json"))

# The fields of KubeRay 1.7's CRDs (ray.io/v1) at the levels above its pods; what is required is in capitals.
RAY_JOB = """activeDeadlineSeconds backoffLimit clusterSelector deletionStrategy entrypoint entrypointNumCpus
    entrypointNumGpus entrypointResources jobId managedBy metadata preRunningDeadlineSeconds rayClusterSpec
    runtimeEnvYAML shutdownAfterJobFinishes submissionMode submitterConfig submitterPodTemplate suspend
    ttlSecondsAfterFinished"""
RAY_CLUSTER = """authOptions autoscalerOptions enableInTreeAutoscaling gcsFaultToleranceOptions HEADGROUPSPEC
    headServiceAnnotations historyServerOptions managedBy networkPolicy rayVersion suspend tlsOptions
    upgradeStrategy workerGroupSpecs"""
HEAD_GROUP = "enableIngress headService ingressOptions labels rayStartParams resources serviceType TEMPLATE"
WORKER_GROUP = """GROUPNAME idleTimeoutSeconds labels MAXREPLICAS MINREPLICAS numOfHosts priority
    rayStartParams replicas resources scaleStrategy suspend TEMPLATE"""
RAY_CRON_JOB = "JOBTEMPLATE SCHEDULE timeZone suspend"


def recorded(script: str, folder: Path, **environ: str) -> list[list[str]]:
    """Run a shell script with a `ray-auditor` that writes down how it is called."""
    stand_in = folder / "bin" / "ray-auditor"
    stand_in.parent.mkdir(exist_ok=True)
    log = folder / "calls"
    stand_in.write_text(
        f"#!{sys.executable}\nimport json, sys\n"
        f"open({str(log)!r}, 'a').write(json.dumps(sys.argv[1:]) + '\\n')\n"
    )
    stand_in.chmod(stand_in.stat().st_mode | stat.S_IXUSR)
    path = f"{stand_in.parent}:{os.environ['PATH']}"
    subprocess.run(
        ["bash", "-c", script], check=True, env={"PATH": path, "HOME": str(folder), **environ}, timeout=60
    )
    return [json.loads(line) for line in log.read_text().splitlines()]


def cron_line() -> list[str]:
    """The one entry of the crontab: five fields, a user, a command."""
    lines = (DEPLOY / "cron" / "ray-auditor").read_text().splitlines()
    (entry,) = [line for line in lines if re.match(r"[\d*]", line)]
    return entry.split(None, 6)


def unit(name: str) -> list[tuple[str, str, str]]:
    """(section, key, value) of a systemd unit, continued lines joined; strict about everything else."""
    text = re.sub(r"\\\n\s*", " ", (DEPLOY / "systemd" / name).read_text())
    section, found = "", []
    for line in text.splitlines():
        if not line or line.startswith("#"):
            continue
        if match := re.fullmatch(r"\[(Unit|Service|Timer|Install)\]", line):
            section = match[1]
            continue
        key, is_pair, value = line.partition("=")
        assert section, line
        assert is_pair, line
        assert re.fullmatch(r"[A-Z]\w+", key), line
        found.append((section, key, value))
    return found


def manifest(name: str) -> dict[str, Any]:
    value: dict[str, Any] = yaml.safe_load((DEPLOY / "kubernetes" / name).read_text())
    return value


def commands(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Every call of `ray-auditor` in every file, as the program would get it."""
    for call in recorded(cron_line()[-1], folder):
        yield "cron", call
    (start,) = [value for _, key, value in unit("ray-auditor.service") if key == "ExecStart"]
    yield "systemd", shlex.split(start)[1:]
    container = manifest("cronjob.yaml")["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"][0]
    assert container["command"] == ["ray-auditor"]
    yield "cronjob", container["args"]
    for name in ("rayjob", "raycronjob"):
        spec = manifest(f"{name}.yaml")["spec"]
        entrypoint = spec.get("jobTemplate", spec)["entrypoint"]
        program, *call = shlex.split(entrypoint)
        assert program == "ray-auditor"
        yield name, call
    (folder / "calls").unlink()
    sbatch = (DEPLOY / "slurm" / "nightly.sbatch").read_text()
    for call in recorded(sbatch, folder, SLURM_GPUS_ON_NODE="4"):
        yield "slurm", call


def test_every_command_composes_to_a_night(tmp_path: Path) -> None:
    register_schemas()
    verbs: dict[str, list[str]] = {}
    for name, call in commands(tmp_path):
        verbs.setdefault(name, []).append(call[0])
        with initialize_config_dir(str(config_dir()), version_base="1.3"):
            config = OmegaConf.to_object(compose("config", overrides=to_overrides(call)))
        assert isinstance(config, AuditConfig)
        config.require_inputs()
        assert config.verb is Verb(call[0])
        assert config.flag.only_new, "the preset for nights"
        assert config.candidates.base_model == "org/base"
        assert config.budget.max_gpu_hours is not None
        assert config.cluster.gpus_per_worker == 1
        assert (config.cluster.address == "auto") == (name in ("rayjob", "raycronjob"))
        if name == "slurm":
            assert config.cluster.num_workers == 4
            assert (config.plan == "/audits/base/plan.json") == (call[0] == "sweep")
    assert verbs.pop("slurm") == ["doctor", "plan", "sweep"]
    assert verbs == {name: ["sweep"] for name in ("cron", "systemd", "cronjob", "rayjob", "raycronjob")}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_a_token_is_named_and_never_there(path: Path) -> None:
    text = path.read_text()
    assert not re.search(r"hf_[A-Za-z0-9]{8}|HF_TOKEN\b|[Pp]assword|SECRET_ACCESS_KEY", text)
    assert path.suffix in (".timer", ".scrontab") or "HF_TOKEN_PATH" in text


def test_cron_fields_are_in_range() -> None:
    *fields, user, command = cron_line()
    for field, (low, high) in zip(fields, [(0, 59), (0, 23), (1, 31), (1, 12), (0, 7)], strict=True):
        assert field == "*" or low <= int(field) <= high
    assert user == "ray-auditor" != "root"
    assert "%" not in command  # cron would end the line there


def test_the_units_hold_before_systemd(tmp_path: Path) -> None:
    service = {(section, key): value for section, key, value in unit("ray-auditor.service")}
    assert service["Service", "User"] == "ray-auditor"
    assert service["Service", "ProtectSystem"] == "strict"
    assert service["Service", "NoNewPrivileges"] == "yes"
    out_dir = re.search(r"out_dir=(\S+)", service["Service", "ExecStart"])
    assert out_dir is not None
    assert out_dir[1].startswith(f"/var/lib/{service['Service', 'StateDirectory']}/")  # the one it may write
    assert ("Timer", "OnCalendar", "*-*-* 02:17:00") in unit("ray-auditor.timer")
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        return
    for name in ("ray-auditor.service", "ray-auditor.timer"):
        text = (DEPLOY / "systemd" / name).read_text()
        (tmp_path / name).write_text(text.replace("/opt/ray-auditor/bin/ray-auditor", "/bin/true"))
    units = [str(tmp_path / name) for name in ("ray-auditor.service", "ray-auditor.timer")]
    done = subprocess.run([analyze, "verify", *units], capture_output=True, text=True, check=False)
    ours = [line for line in done.stderr.splitlines() if str(tmp_path) in line or "ray-auditor" in line]
    assert not ours, done.stderr


def test_no_scheduler_starts_a_night_again_that_used_its_budget_up() -> None:
    prevented = {key: value for _, key, value in unit("ray-auditor.service")}["RestartPreventExitStatus"]
    job = manifest("cronjob.yaml")["spec"]["jobTemplate"]["spec"]
    (failed,) = [rule for rule in job["podFailurePolicy"]["rules"] if rule["action"] == "FailJob"]
    assert {str(EXIT_FAILED), "1", "3", "4"} == set(prevented.split())
    assert set(map(int, prevented.split())) == set(failed["onExitCodes"]["values"])
    for name in ("rayjob", "raycronjob"):
        spec = manifest(f"{name}.yaml")["spec"]
        assert spec.get("jobTemplate", spec)["backoffLimit"] == 0


def test_scripts_parse(tmp_path: Path) -> None:
    subprocess.run(["bash", "-n", str(DEPLOY / "slurm" / "nightly.sbatch")], check=True)
    text = (DEPLOY / "slurm" / "nightly.sbatch").read_text()
    options = dict(re.findall(r"^#SBATCH --([a-z-]+)=(\S+)$", text, re.MULTILINE))
    assert len(options) == text.count("#SBATCH")
    assert options["dependency"] == "singleton"
    hours = float(re.search(r"max_gpu_hours=(\d+)", text)[1]) / int(options["gpus-per-node"])  # type: ignore[index]
    assert hours < int(options["time"].split(":")[0]), "Slurm would end it before its budget does"
    lines = (DEPLOY / "slurm" / "nightly.scrontab").read_text().splitlines()
    assert all(re.match(r"#|(\S+ ){5}sbatch ", line) for line in lines)


def test_the_cronjob_is_kubernetes() -> None:
    kubernetes_validate.validate(manifest("cronjob.yaml"), KUBERNETES, strict=True)
    broken = manifest("cronjob.yaml")
    broken["spec"]["concurrentPolicy"] = broken["spec"].pop("concurrencyPolicy")
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(broken, KUBERNETES, strict=True)


def check_fields(value: dict[str, Any], fields: str) -> None:
    known = {name.lower(): name.isupper() for name in fields.split()}
    given = {name.lower() for name in value}
    assert given <= known.keys(), given - known.keys()
    assert {name for name, needed in known.items() if needed} <= given


def ray_pods(spec: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Check a RayJob's spec; its pods by group."""
    check_fields(spec, RAY_JOB)
    cluster = spec["rayClusterSpec"]
    check_fields(cluster, RAY_CLUSTER)
    assert cluster["authOptions"] == {"mode": "token"}
    check_fields(cluster["headGroupSpec"], HEAD_GROUP)
    pods = {"head": cluster["headGroupSpec"]["template"]}
    for group in cluster["workerGroupSpecs"]:
        check_fields(group, WORKER_GROUP)
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
        assert f"cluster.num_workers={group['replicas']}" in spec["entrypoint"]
        pods[group["groupName"]] = group["template"]
    return pods


def test_the_rayjob_is_kuberays_and_the_cron_job_is_the_same_every_night() -> None:
    job, cron = manifest("rayjob.yaml"), manifest("raycronjob.yaml")
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    assert (cron["apiVersion"], cron["kind"]) == ("ray.io/v1", "RayCronJob")
    check_fields(cron["spec"], RAY_CRON_JOB)
    assert cron["spec"]["jobTemplate"] == job["spec"]
    pods = ray_pods(job["spec"])
    for name, pod in pods.items():
        whole = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, **pod}
        kubernetes_validate.validate(whole, KUBERNETES, strict=True)
    assert "hf-token" in yaml.dump(pods["head"])
    assert "token" not in yaml.dump(pods["gpus"]).lower().replace("automountserviceaccounttoken", "")


def test_no_pod_is_root_or_writes_to_its_root() -> None:
    cronjob = manifest("cronjob.yaml")["spec"]["jobTemplate"]["spec"]["template"]
    for pod in (cronjob, *ray_pods(manifest("rayjob.yaml")["spec"]).values()):
        spec = pod["spec"]
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["runAsUser"] > 0
        assert spec["automountServiceAccountToken"] is False
        volumes = {volume["name"] for volume in spec["volumes"]}
        for container in spec["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert {mount["name"] for mount in container["volumeMounts"]} == volumes
