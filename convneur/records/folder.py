"""Names of what a run leaves in its folder.

They are spelled here, and in launch/supervisor/run_files.py, which imports nothing of the project.

    config.yaml              what is trained
    reproduce.json           what it was made with
    beginning.txt            what a run of submitted jobs began from, if it wasn't new weights alone
    metrics.jsonl            losses, scores and gauges, a line each time
    tensorboard/             the same as TensorBoard events
    curve.png                the same as a picture
    summary.json             how the run ended; there is none before
    checkpoints/             folders step-00000460, and
        LATEST, BEST         which of them is the newest, and which has the best evaluation
        step-.../            see convneur.records.checkpoint
    stacks/rank-3.txt        where a rank was that hung
    profile/trace.json       what some steps spent their time on
    attempts.jsonl           starts and ends of the jobs that train it, on Slurm
    faults/                  how ranks of those jobs ended that failed; their names are the supervisor's alone
    .lock                    who trains it: no other process may meanwhile
"""

CONFIG_FILE = "config.yaml"
"""Of a run, and of each of its checkpoints."""

REPRODUCE_FILE = "reproduce.json"
BEGINNING_FILE = "beginning.txt"
METRICS_FILE = "metrics.jsonl"
DAMAGED_METRICS_FILE = f"{METRICS_FILE}.damaged"
EVENTS = "tensorboard"
CURVE_FILE = "curve.png"
SUMMARY_FILE = "summary.json"
STACKS = "stacks"
TRACE_FILE = "profile/trace.json"
ATTEMPTS_FILE = "attempts.jsonl"
LOCK_FILE = ".lock"

CHECKPOINTS = "checkpoints"
LATEST = "LATEST"
BEST = "BEST"

# Of a checkpoint.
MANIFEST = "manifest.json"
STATE_FILE = "state.json"
CLASSES_FILE = "classes.json"
MODEL_FILE = "model.safetensors"
EMA_FILE = "ema.safetensors"
BUFFERS_FILE = "buffers.safetensors"
EMA_BUFFERS_FILE = "ema-buffers.safetensors"
MOMENTS = "optimizer"
OPTIMIZER_FILE = "optimizer.json"
