from shared.logit_shards import main

main()
