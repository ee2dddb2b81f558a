package main

import (
	"context"
	"crypto/ecdh"
	"crypto/rand"
	"encoding/base64"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"
)

// Addresses of the tunnel, of the range that is for benchmarks (RFC 2544).
const (
	tunnelClient = "198.18.0.1"
	tunnelServer = "198.18.0.2"
	tunnelPort   = "51820"
)

// end is one end of the tunnel.
type end struct {
	side, tunnel, pod string
	key               *ecdh.PrivateKey
}

// addWireGuard puts wireguard-go between the plain pods. It is there since users ask,
// and has no bound: where it cannot be, which is so for ordinary users on most machines,
// it is left out, and the result says why.
func (r *rig) addWireGuard(ctx context.Context, plain string) error {
	if err := r.canWireGuard(ctx); err != nil {
		r.notes = append(r.notes, fmt.Sprintf("wireguard-go is left out: %v", err))
		return nil
	}
	client, err := r.podIP(ctx, "plain/client")
	if err != nil {
		return err
	}
	ends := [2]end{{side: "client", tunnel: tunnelClient, pod: client}, {side: "server", tunnel: tunnelServer, pod: plain}}
	for i := range ends {
		if ends[i].key, err = ecdh.X25519().GenerateKey(rand.Reader); err != nil {
			return err
		}
	}
	if err := errors.Join(r.startWireGuard(ctx, ends[0], ends[1]), r.startWireGuard(ctx, ends[1], ends[0])); err != nil {
		return err
	}
	r.modes = append(r.modes, mode{name: "wireguard", load: way{"plain/client", tunnelServer + ":"}, beside: true, only: bulkOnly, carriers: "wireguard", count: 2})
	return nil
}

func (r *rig) canWireGuard(ctx context.Context) error {
	tun, err := os.OpenFile("/dev/net/tun", os.O_RDWR, 0)
	if err != nil {
		return err
	}
	tun.Close()
	cmd := exec.CommandContext(ctx, "go", "build", "-C", "bench/wireguard", "-o", r.tools+"/", "golang.zx2c4.com/wireguard")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("build it in bench/wireguard: %w\n%s", err, out)
	}
	return nil
}

// startWireGuard makes an interface in one pod. Both have names of their own: all pods
// share the folder of the sockets by which wg finds them.
func (r *rig) startWireGuard(ctx context.Context, own, peer end) error {
	name, pod := "wg-"+own.side, "plain/"+own.side
	config := filepath.Join(r.tools, name+".conf")
	if err := os.WriteFile(config, []byte(wireguardConfig(own, peer)), 0o600); err != nil {
		return err
	}
	if err := r.do(ctx, fmt.Sprintf("start %s %s -- wireguard -f %s", name, pod, name)); err != nil {
		return err
	}
	soon, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	// It has no socket yet in its first moments.
	if err := r.retry(soon, func() error { return r.do(ctx, fmt.Sprintf("exec %s -- wg setconf %s %s", pod, name, config)) }); err != nil {
		return err
	}
	return errors.Join(
		r.do(ctx, fmt.Sprintf("exec %s -- ip address add %s/30 dev %s", pod, own.tunnel, name)),
		r.do(ctx, fmt.Sprintf("exec %s -- ip link set %s up", pod, name)))
}

// wireguardConfig is for wg setconf (wg(8)).
func wireguardConfig(own, peer end) string {
	return strings.Join([]string{
		"[Interface]",
		"PrivateKey = " + base64.StdEncoding.EncodeToString(own.key.Bytes()),
		"ListenPort = " + tunnelPort,
		"[Peer]",
		"PublicKey = " + base64.StdEncoding.EncodeToString(peer.key.PublicKey().Bytes()),
		"AllowedIPs = " + peer.tunnel + "/32",
		"Endpoint = " + peer.pod + ":" + tunnelPort,
		"",
	}, "\n")
}
