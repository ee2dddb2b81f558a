# What the client does with nginx, Redis and PostgreSQL; the same words come out of
# it with and without a mesh.
set -eu
fetch() { curl -sS --fail --max-time 60 "$@"; }

fetch http://web/customer.json
echo "nginx, kept alive, connections made: $(fetch -w ' %{num_connects}' 'http://web/customer.json?[1-4]' -o /dev/null)"
echo "nginx, not kept alive, connections made: $(fetch -w ' %{num_connects}' -H 'Connection: close' 'http://web/customer.json?[1-4]' -o /dev/null)"
echo "nginx, at once: $(fetch -Z --parallel-immediate --parallel-max 50 -H 'Connection: close' -w '%{http_code}\n' 'http://web/customer.json?[1-50]' -o /dev/null | sort | uniq -c)"
echo "nginx, 20 MB: $(fetch http://web/big | sha256sum)"

cli() { redis-cli -h cache "$@"; }
cli flushall
cli set secret 'salary of Ada is 5000'
cli get secret
redis-benchmark -q -h cache -n 2000 -c 20 -t set,get >/dev/null
redis-benchmark -q -h cache -n 8000 -c 20 -P 16 -t set,get,lpush >/dev/null
echo "redis, pipelined: $(cli llen mylist) in the list"
seq 100000 | cli -x set numbers
echo "redis, 600 kB: $(cli get numbers | sha256sum)"

export PGUSER=app PGDATABASE=postgres PGHOST=db PGCONNECT_TIMEOUT=20
for PGSSLMODE in disable require; do
  export PGSSLMODE
  psql -qAtc "select 'postgres, $PGSSLMODE: pension of Ada is 3000, TLS: ' || ssl from pg_stat_ssl where pid = pg_backend_pid()"
  pgbench -i -q 2>/dev/null
  for way in '-c 4 -j 2 -t 50' '-c 2 -j 1 -t 10 -C' '-c 4 -j 2 -t 50 -S -M prepared'; do
    pgbench -n $way | grep -E '^number of (transactions|failed)|^query mode'
  done
  psql -qAtc "select 'history ' || count(*) || ', sums agree: ' || (sum(delta) = (select sum(abalance) from pgbench_accounts)) from pgbench_history"
  psql -qAtc "copy (select i, repeat('x', 200) from generate_series(1, 20000) i) to stdout" | sha256sum
done
