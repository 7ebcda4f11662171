"""Two gloo processes on this machine's CPU under ``accelerate launch``."""

import os
import socket
import subprocess
import sys


def launch_two(*program, timeout, **environment):
    """Run a script, or ``-m`` and a module, with its arguments in two processes; returns the finished process."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # --multi_gpu is accelerate's name for its torchrun launcher; its --cpu wants MPI
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    command += ["--main_process_ip", "127.0.0.1", "--main_process_port", str(port)]
    cpu = {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, *program],
        env={**os.environ, **cpu, **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
