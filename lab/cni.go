package lab

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"time"
)

// cni runs the real tacit-cni as a runtime would, chained after the plugin that
// made the pod's network (the lab itself). Without a mesh there is no plugin.
func (c *Cluster) cni(ctx context.Context, command string, p *pod) error {
	if !c.options.Mesh {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, c.options.CNITimeout+10*time.Second)
	defer cancel()
	conf, err := json.Marshal(cniConfig(p, c.options.CNITimeout))
	if err != nil {
		return err
	}
	cmd := exec.CommandContext(ctx, filepath.Join(c.options.Bin, "tacit-cni"))
	cmd.Env = append(os.Environ(),
		"CNI_COMMAND="+command, "CNI_CONTAINERID="+p.uid, "CNI_NETNS="+p.path, "CNI_IFNAME="+podLink, "CNI_PATH="+c.options.Bin,
		fmt.Sprintf("CNI_ARGS=IgnoreUnknown=1;K8S_POD_NAMESPACE=%s;K8S_POD_NAME=%s;K8S_POD_INFRA_CONTAINER_ID=%s;K8S_POD_UID=%s",
			p.namespace, p.name, p.uid, p.uid))
	var out, said bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = bytes.NewReader(conf), &out, &said
	if err := p.node.ns.Do(cmd.Start); err != nil {
		return fmt.Errorf("start tacit-cni: %w", err)
	}
	if err := cmd.Wait(); err != nil {
		return fmt.Errorf("CNI %s: %w: %s %s", command, err, bytes.TrimSpace(out.Bytes()), bytes.TrimSpace(said.Bytes()))
	}
	if command == "ADD" {
		return checkResult(conf, out.Bytes())
	}
	return nil
}

// cniConfig is the plugin's configuration with the previous plugin's result.
func cniConfig(p *pod, timeout time.Duration) map[string]any {
	gw := gateway(p.node.number)
	return map[string]any{
		"cniVersion": "1.0.0", "name": "lab", "type": "tacit-cni",
		"agent": filepath.Join(p.node.dir, "cni.sock"), "timeout": timeout.String(),
		"prevResult": map[string]any{
			"cniVersion": "1.0.0",
			"interfaces": []any{map[string]any{"name": podLink, "sandbox": p.path}},
			"ips": []any{
				map[string]any{"address": host(p.address.v4).String(), "gateway": gw.v4.String(), "interface": 0},
				map[string]any{"address": host(p.address.v6).String(), "gateway": gw.v6.String(), "interface": 0},
			},
			"dns": map[string]any{},
		},
	}
}

// checkResult holds the plugin to what a chained plugin has to do: hand on the
// result of the one before.
func checkResult(conf, result []byte) error {
	var before struct {
		PrevResult struct {
			IPs json.RawMessage `json:"ips"`
		} `json:"prevResult"`
	}
	var after struct {
		IPs json.RawMessage `json:"ips"`
	}
	if err := json.Unmarshal(conf, &before); err != nil {
		return err
	}
	if err := json.Unmarshal(result, &after); err != nil {
		return fmt.Errorf("CNI ADD answered no result: %w: %s", err, result)
	}
	var a, b any
	if json.Unmarshal(before.PrevResult.IPs, &a) != nil || json.Unmarshal(after.IPs, &b) != nil || fmt.Sprint(a) != fmt.Sprint(b) {
		return fmt.Errorf("CNI ADD changed the addresses: %s", result)
	}
	return nil
}
