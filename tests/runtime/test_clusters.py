"""Who a process is, from what launchers leave in its environment."""

import pytest

from shardlm.runtime.clusters import Place, detect, first_host

SLURM = {
    "SLURM_JOB_ID": "70001",
    "SLURM_STEP_NODELIST": "gpu[007-008]",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
}
OPEN_MPI = {
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
OURS = {"SHARDLM_COORDINATOR": "a:1", "SHARDLM_PROCESSES": "2", "SHARDLM_PROCESS": "1"}


def test_alone():
    assert detect({"SLURM_JOB_ID": "7", "PATH": "/bin"}) is None  # in a job, but in no step of it


def test_slurm():
    assert detect(SLURM) == Place("gpu007:61809", 4, 3, 1, 2, "Slurm")
    assert 61440 + 70001 % 4096 == 61809
    assert detect(SLURM | {"JAX_COORDINATOR_PORT": "99"}).coordinator == "gpu007:99"


def test_open_mpi():
    assert detect(OPEN_MPI) == Place("10.96.0.1:62624", 2, 1, 1, 2, "Open MPI")
    assert 61440 + 1531576320 // 4096 % 4096 == 62624
    six = OPEN_MPI | {"OMPI_MCA_orte_hnp_uri": "1314521088.0;tcp6://[fe80::b9b:ac5d,2620:10d::2]:43370"}
    assert detect(six).coordinator.startswith("[fe80::b9b:ac5d]:")
    with pytest.raises(ValueError, match=r"names no address \(Open MPI 5 does not set it\): set SHARDLM_COORDINATOR"):
        detect(OPEN_MPI | {"OMPI_MCA_orte_hnp_uri": ""})


def test_ours_come_first_and_go_together():
    assert detect(SLURM | OURS) == Place("a:1", 2, 1, 0, 1, "SHARDLM_PROCESSES and SHARDLM_PROCESS")
    with pytest.raises(ValueError, match="SHARDLM_COORDINATOR, SHARDLM_PROCESS not set"):
        detect({"SHARDLM_PROCESSES": "2"})
    with pytest.raises(ValueError, match="SHARDLM_PROCESS='one' is not an integer"):
        detect(OURS | {"SHARDLM_PROCESS": "one"})


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("node1", "node1"), ("node1,host2", "node1"), ("node[001-015],host2", "node001"), ("n[7,9]-ib", "n7-ib")],
)
def test_the_first_host(nodes, first):
    assert first_host(nodes) == first
