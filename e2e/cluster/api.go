package cluster

import (
	"context"
	_ "embed"
	"encoding/json"
	"fmt"
	"path/filepath"
	"strings"

	"golang.org/x/sync/errgroup"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/clientcmd"

	"tacit.dev/e2e/build"
)

//go:embed coredns.yaml
var coreDNS string

func newClient(kubeconfig string) (kubernetes.Interface, error) {
	config, err := clientcmd.BuildConfigFromFlags("", kubeconfig)
	if err != nil {
		return nil, err
	}
	config.QPS, config.Burst = 1000, 1000 // nobody to be protected from
	return kubernetes.NewForConfig(config)
}

func (c *Cluster) waitAPI(ctx context.Context) error {
	err := build.Poll(ctx, func() error {
		_, err := c.client.Discovery().RESTClient().Get().AbsPath("/readyz").DoRaw(ctx)
		return err
	})
	if err != nil {
		return fmt.Errorf("no API server (see %s): %w", filepath.Join(c.controlPlane.dir, "kube-apiserver.log"), err)
	}
	return nil
}

// waitReady waits for the kubelet to register its node, tells which addresses its
// pods have, and waits until the node is Ready.
func (c *Cluster) waitReady(ctx context.Context, n *node) error {
	ctx, cancel := n.whileAlive(ctx)
	defer cancel()
	err := build.Poll(ctx, func() error {
		o, err := c.client.CoreV1().Nodes().Get(ctx, n.name, metav1.GetOptions{})
		if err != nil {
			return err
		}
		if o.Spec.PodCIDR == "" {
			return fmt.Errorf("pod CIDR: %w", c.setPodCIDRs(ctx, n))
		}
		return nodeReady(o)
	})
	if err != nil {
		return fmt.Errorf("node %s is not Ready (see %s/var/log): %w", n.name, n.dir, err)
	}
	return nil
}

func nodeReady(o *corev1.Node) error {
	for _, condition := range o.Status.Conditions {
		if condition.Type != corev1.NodeReady {
			continue
		}
		if condition.Status != corev1.ConditionTrue {
			return fmt.Errorf("%s: %s", condition.Reason, condition.Message)
		}
		return nil
	}
	return fmt.Errorf("node %s has no condition Ready yet", o.Name)
}

// setPodCIDRs says on the Node what its CNI configuration says.
func (c *Cluster) setPodCIDRs(ctx context.Context, n *node) error {
	var all []string
	for _, p := range c.options.nodePodCIDRs(n.number) {
		all = append(all, p.String())
	}
	patch, err := json.Marshal(map[string]any{"spec": map[string]any{"podCIDR": all[0], "podCIDRs": all}})
	if err != nil {
		return err
	}
	_, err = c.client.CoreV1().Nodes().Patch(ctx, n.name, types.MergePatchType, patch, metav1.PatchOptions{})
	return err
}

func (c *Cluster) bootID(ctx context.Context, name string) (string, error) {
	o, err := c.client.CoreV1().Nodes().Get(ctx, name, metav1.GetOptions{})
	if err != nil {
		return "", err
	}
	return o.Status.NodeInfo.BootID, nil
}

// furnish gives a cluster what people expect in it: DNS, and the service account
// without which no pod can be made.
func (c *Cluster) furnish(ctx context.Context) error {
	all, ctx := errgroup.WithContext(ctx)
	all.Go(func() error {
		return build.Poll(ctx, func() error {
			_, err := c.client.CoreV1().ServiceAccounts("default").Get(ctx, "default", metav1.GetOptions{})
			return err
		})
	})
	all.Go(func() error {
		if c.options.NoDNS {
			return nil
		}
		_, err := c.Apply(ctx, strings.NewReplacer("IMAGE", DNSImage, "ADDRESS", dnsService4).Replace(coreDNS))
		return err
	})
	return all.Wait()
}

func ignoreNotFound(err error) error {
	if apierrors.IsNotFound(err) {
		return nil
	}
	return err
}
