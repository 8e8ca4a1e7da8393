"""What is left of somebody on this host: looked for, told and repaired, by the verb and by the manager."""
