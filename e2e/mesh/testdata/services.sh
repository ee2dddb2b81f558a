# Which servers the client reaches by each service.
set -eu
who() { curl -sS --max-time 2 "http://$1/" 2>/dev/null | sed 's/^this is \([a-z]*\) .*/\1/'; }
all() { for _ in $(seq 24); do who "$1"; done | sort -u | tr '\n' ' '; }
none() { answer=$(who "$1"); echo "${answer:-no answer}"; }

echo "named ports: $(all named)"
echo "affinity: $(all sticky | wc -w) server"
echo "policy Local: $(all local)"
echo "policy Local, nobody there: $(none local-elsewhere)"
echo "same node: $(all same-node)"
echo "same zone: $(all same-zone)"
echo "nobody in the zone: $(all other-zone)"
echo "not ready: $(none unready)"
echo "not ready, but published: $(all early)"
echo "headless: $(all headless:9090)"
echo "external name: $(all external)"
