from teacher_dump.cli import main

main()
