#!/bin/bash
# Workers of rq-fleet; made by `fleet slurm`. No secret is in it: what it names of Redis is no password.
#SBATCH --job-name=sim.1
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=2
#SBATCH --array=0-2
#SBATCH --cpus-per-task=8
#SBATCH --time=01:30:00
#SBATCH --account=physics
#SBATCH --partition=gpu,long
#SBATCH --qos=high
#SBATCH --mem=64G
#SBATCH --constraint=[rack1|rack2]&nvme
#SBATCH --gpus-per-node=a100:4
#SBATCH --signal=B:TERM@120
#SBATCH --output=/scratch/me/out/log/slurm-%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --no-kill
#SBATCH --exclusive
#SBATCH --reservation=exam_1

# --- from --setup ---
module load python
# --- until here ---

export FLEET_REDIS_URL=redis://login-ib:6379/0
export FLEET_REDIS_PASSWORD_FILE=/home/me/secret
export FLEET_WORKER__STOP_GRACE_SECONDS=25
# For workers to which Slurm does not say when it ends this job.
export FLEET_ALLOCATION_ENDS_AT=$(($(date +%s) + 5400))
if [[ ! -r $FLEET_REDIS_PASSWORD_FILE || -n $(find -L "$FLEET_REDIS_PASSWORD_FILE" -perm /077) ]]; then
    echo "$FLEET_REDIS_PASSWORD_FILE, the password of Redis, cannot be read at $(hostname), or is open to others" >&2
    exit 2
fi

# Slurm warns this shell alone, 120 s before the end. Workers take this signal as the end of
# their allocation, which is near; jobs are not disturbed by it. The id of an array's last job is that of the array.
job=$SLURM_JOB_ID
if [[ -n ${SLURM_ARRAY_JOB_ID:-} ]]; then job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID; fi
trap 'scancel --quiet --signal=URG "$job" 2>/dev/null' TERM

srun --ntasks-per-node=2 --cpus-per-task=8 \
    --wait=0 --kill-on-bad-exit=0 --no-kill --label \
    /opt/fleet/bin/python -I -m cli worker --queues gpu,default --label 'what=it'"'"'s $(here)' --startup-delay-seconds 8 &
workers=$!

# A signal cuts `wait` short, and the workers are still there.
code=0
while kill -0 "$workers" 2>/dev/null; do
    wait "$workers"
    code=$?
done
exit "$code"
