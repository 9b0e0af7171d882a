"""What this machine has and lacks: examinations that `mpk-spec doctor` prints and the runtime asks."""
