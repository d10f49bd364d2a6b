"""Many runs compared: ablations and scaling studies."""
