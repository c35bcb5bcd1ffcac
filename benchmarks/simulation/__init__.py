"""A cluster in one process: real coordination code, simulated clock, network and disks."""
