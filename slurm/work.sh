# Slurm sends this shell USR1 some time before the limit, and at preemption where the cluster is set up so. The work is then asked to
# end, saves, and {% if chain %}the next job of the chain goes on{% else %}the job goes back into the queue{% endif %}. scancel sends TERM, to every process of the job: nothing is left to do but wait.
work=
stop_asked=
cancelled=
trap 'stop_asked=yes; stop_work' USR1
trap 'stop_asked= cancelled=yes' TERM

# In the grace time of a partition Slurm sends TERM to the job's steps and nothing to this shell; only the job's record tells.
preempted() { [ -z "$cancelled" ] && scontrol show job "$SLURM_JOB_ID" | grep -q ' PreemptTime=[0-9]'; }

wait_for() {  # waits for process $1, through signals; its exit code
    while wait "$1"; kill -0 "$1" 2>/dev/null; do :; done
    wait "$1" 2>/dev/null  # bash remembers the code that a signal hid
}

end() {  # with exit code $1, or back into the queue
{% if not chain %}
    if [ "$1" -ne 0 ] && { [ -n "$stop_asked" ] || preempted; }; then
        echo "--- $(date '+%F %T') stopped before the limit, or preempted; back into the queue"
        scontrol requeue "${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_}${SLURM_ARRAY_TASK_ID:-$SLURM_JOB_ID}"
        sleep 60  # until Slurm ends this shell
    fi
{% endif %}
    exit "$1"
}

echo "--- $(date '+%F %T') job $SLURM_JOB_ID on $SLURM_JOB_NODELIST, restarts: ${SLURM_RESTART_COUNT:-0}"
