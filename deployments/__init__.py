"""What a Prefect server needs to run the flows: `prefect.yaml`, and a stack on one machine for it."""
