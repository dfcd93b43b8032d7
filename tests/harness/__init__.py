"""Real processes for distributed tests: gloo ranks on the CPU, never mocks of communication."""
