#!/usr/bin/env bash
# The told story: nginx, PostgreSQL, curl and psql on two nodes; first in the
# clear, then the namespace is labeled, then the same again through mutual TLS.
# Needs bin/ (make build) and Debian's packages (make packages). Ends with an
# error if anything it claims is not so.
set -eu -o pipefail

cd "$(dirname "$0")/.."
began=$SECONDS
name=demo-$$
work=$(mktemp -d)
chmod 755 "$work"
card=4111-1111-1111-1111
salary='salary of Ada is 5000'

lab() { verb=$1; shift; bin/tacit lab "$verb" --name "$name" "$@"; }
say() { printf '\n\033[1m%s\033[0m\n' "$*"; }
show() { sed 's/^/    /'; }
cleanup() {
  status=$?
  trap - EXIT
  bin/tacit lab down --name "$name" >/dev/null 2>&1 || true
  rm -rf "$work"
  [ $status -eq 0 ] || echo "demo: failed" >&2
  exit $status
}
trap cleanup EXIT
trap 'exit 130' INT TERM

# PostgreSQL refuses to run as root, and in the lab of an ordinary user we are root.
if [ "$(id -u)" = 0 ]; then
  as_postgres=(setpriv --reuid=postgres --regid=postgres --clear-groups)
  install -d -o postgres "$work/pg"
  prepare=("${as_postgres[@]}")
else
  as_postgres=(unshare --user --map-user=1000 --map-group=1000)
  mkdir "$work/pg"
  prepare=()
fi
pg=$(ls -d /usr/lib/postgresql/*/bin | sort -V | tail -1)
"${prepare[@]}" "$pg/initdb" -D "$work/pg/data" -U app -A trust --no-sync >"$work/initdb.log" 2>&1 || { cat "$work/initdb.log"; exit 1; }
echo 'host all all all trust' >>"$work/pg/data/pg_hba.conf"

mkdir "$work/web"
echo "{\"customer\": \"Ada\", \"card\": \"$card\"}" >"$work/web/customer.json"
cat >"$work/nginx.conf" <<EOF
daemon off; user root; worker_processes 1; pid $work/nginx.pid; error_log $work/nginx.log;
events {}
http { access_log off; server { listen 80; listen [::]:80; root $work/web; } }
EOF

say "Two nodes, three pods: nginx and PostgreSQL on n2, a client on n1. Tacit runs, and nobody is in the mesh."
lab up >/dev/null
lab node n1 n2
lab pod n1/shop/client sa=client
lab pod n2/shop/web sa=web port=http:80 -- nginx -e "$work/nginx.log" -c "$work/nginx.conf"
lab pod n2/shop/db sa=db port=sql:5432 -- "${as_postgres[@]}" "$pg/postgres" -D "$work/pg/data" -h '*' -k "$work/pg" -c fsync=off
lab service shop/web 80:http
lab service shop/db 5432:sql
query() { lab exec shop/client -- psql -h db -U app -d postgres -v ON_ERROR_STOP=1 -qAtc "$1"; }
fetch() { lab exec shop/client -- curl -sS --retry 20 --retry-connrefused --retry-delay 0 --max-time 20 http://web/customer.json; }
fetch >/dev/null
for _ in $(seq 100); do query 'select 1' >/dev/null 2>&1 && break; sleep 0.1; done
query "create table pay (line text); insert into pay values ('$salary')"
lab status | show

say "1. In the clear. curl and psql from n1, and what the wire of n1 shows:"
lab capture start before n1
fetch | show
query 'select line from pay' | show
lab capture grep before "$card" | show
lab capture grep before "$salary" | show
lab capture stop before >/dev/null

say "2. A psql session is opened now, and stays open. Then one label on the namespace; nothing is restarted."
lab start session shop/client -- psql -h db -U app -d postgres -qAt -c \
  "select 'session opened before the label'; select pg_sleep(3); select 'and it is still there: ' || line from pay"
for _ in $(seq 100); do [ "$(query "select count(*) from pg_stat_activity where query like '%still there%' and pid <> pg_backend_pid()")" != 0 ] && break; sleep 0.1; done
programs() { pgrep -f "$work/(nginx.conf|pg/data)" | sort | tr '\n' ' '; }
running=$(programs)
echo '$ kubectl label namespace shop tacit.dev/mesh=on      (here: tacit lab label)' | show
lab label namespace shop tacit.dev/mesh=on
lab wait protected shop/client shop/web shop/db
[ "$running" = "$(programs)" ] || { echo "a program was restarted: [$running] became [$(programs)]"; exit 1; }
echo "the programs are the same processes as before: $running" | show

say "3. The same transfers again."
lab capture start after n1
fetch | show
query 'select line from pay' | show
echo "what the wire of n1 shows:" | show
for secret in "$card" "$salary"; do
  if lab capture grep after "$secret" >/dev/null 2>&1; then echo "in clear: $secret"; exit 1; fi
  echo "not on the wire: $secret" | show
done
{ echo -n 'client and web: '; lab capture tls after shop/client shop/web
  echo -n 'client and web: '; lab capture ports after shop/client shop/web 80
  echo -n 'client and db:  '; lab capture ports after shop/client shop/db 5432; } | show

say "4. Both identities, as the node of the server proved them:"
lab log n2/proxy 'connection closed' security=mutual_tls sa/client sa/web | tail -1 | grep -o 'security=.*' | show
lab log n2/proxy 'connection closed' security=mutual_tls sa/client sa/db | tail -1 | grep -o 'security=.*' | show

say "5. The session from before the label:"
for _ in $(seq 100); do lab log session 2>/dev/null | grep -q 'still there' && break; sleep 0.1; done
lab stop session | grep . | show

say "6. Status:"
lab status | show
say "Shown in $((SECONDS - began)) s: no program was changed or restarted, its bytes are no longer on the wire, ports are the same, and both ends proved who they are."
