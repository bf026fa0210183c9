"""What was measured, told: tables and plots."""
