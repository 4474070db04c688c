"""What can be known about a job before a weight is read. It never prints and never raises."""
