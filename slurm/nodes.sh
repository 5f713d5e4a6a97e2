address_of() {  # the IPv4 address that Slurm itself uses for node $1
    local address
    address=$(scontrol show node "$1" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
    getent ahostsv4 "$address" | awk '{print $1; exit}'
}
export -f address_of
head=$(address_of "$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)")
port=$((20000 + SLURM_JOB_ID % 10000))  # other jobs may share a node
export head port
