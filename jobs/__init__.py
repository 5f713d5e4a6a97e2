"""One program per training stage: `accelerate launch -m jobs.<stage> run.yaml`."""

from jobs.lifeline import die_with_parent, launched

if launched():  # first of all: importing torch takes seconds, in which a launcher can die
    die_with_parent()
