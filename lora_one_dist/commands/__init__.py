"""What a user runs beside training: plan, doctor, report, sweep, export, merge, ...  Uses every room."""
