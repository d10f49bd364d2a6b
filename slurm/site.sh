# shellcheck shell=bash disable=SC2034  # what is set here is read by common.sh
# What is special about a cluster; edit it once. Every job reads it. So does a shell on the login node that submits
# jobs, for the sbatch part: `. slurm/site.sh`, there or in ~/.bashrc.

# sbatch: any SBATCH_* variable of `man sbatch`. They win over the #SBATCH lines of a script and lose to the command line.
#export SBATCH_PARTITION=gpu
#export SBATCH_ACCOUNT=my-project

# Folders, seen under the same path by all nodes. A relative one begins where the job was submitted.
#data=/scratch/imagenet
#runs=/scratch/$USER/runs

# What the command needs to run.
#module load cuda/12.8
#export https_proxy=http://proxy:3128

# The command, if it isn't the checkout's own .venv/bin/convneur; and more options for srun.
#convneur=(apptainer exec --nv --bind /scratch /scratch/convneur.sif convneur)
#python=/usr/bin/python3 # 3.9 or newer, outside of the container: it looks after srun
#srun_options=(--container-image=/scratch/convneur.sqsh --container-mounts=/scratch)

# Network, where the choice made at the start of a job's log is wrong.
#export GLOO_SOCKET_IFNAME=ib0
#export NCCL_SOCKET_IFNAME=ib0
