"""The command line: one small file a command. Each is imported when it is called, so that `dllm --help` is instant."""
