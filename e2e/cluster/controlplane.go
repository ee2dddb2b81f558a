package cluster

import (
	"fmt"
	"path/filepath"

	"tacit.dev/e2e/machine"
)

const controlPlaneName = "control-plane"

// controlPlanePlan has the four processes of a control plane, all of which see the
// host's files. They come in any order: each is started again until it stays.
func (c *Cluster) controlPlanePlan() machine.Plan {
	return machine.Plan{
		Name:    controlPlaneName,
		Path:    "/usr/sbin:/usr/bin",
		Sysctls: c.options.sysctls(),
		Steps: []machine.Step{
			c.component("etcd", "--data-dir", filepath.Join(c.controlPlane.dir, "etcd")),
			c.component("kube-apiserver", c.apiServerFlags()...),
			c.component("kube-controller-manager", c.controllerFlags()...),
			c.component("kube-scheduler", append(c.authFlags("kube-scheduler"), "--leader-elect=false",
				"--kube-api-qps=1000", "--kube-api-burst=2000")...),
		},
	}
}

func (c *Cluster) component(name string, flags ...string) machine.Step {
	command := append([]string{filepath.Join(c.programs.Kubernetes, "kubenode"), name}, flags...)
	return machine.Step{Name: name, Command: command, Keep: true, Log: filepath.Join(c.controlPlane.dir, name+".log")}
}

func (c *Cluster) apiServerFlags() []string {
	p := c.pki.path
	return []string{
		"--etcd-servers=http://127.0.0.1:2379", "--bind-address=0.0.0.0", "--advertise-address=" + controlPlane4,
		fmt.Sprintf("--secure-port=%d", apiPort), "--service-cluster-ip-range=" + c.options.serviceCIDRs(),
		"--allow-privileged=true", "--authorization-mode=Node,RBAC", "--enable-admission-plugins=NodeRestriction",
		"--client-ca-file=" + p("ca.crt"), "--tls-cert-file=" + p("apiserver.crt"), "--tls-private-key-file=" + p("apiserver.key"),
		"--service-account-issuer=https://kubernetes.default.svc.cluster.local",
		"--service-account-key-file=" + p("sa.pub"), "--service-account-signing-key-file=" + p("sa.key"),
		"--kubelet-client-certificate=" + p("kubelet-client.crt"), "--kubelet-client-key=" + p("kubelet-client.key"),
		"--kubelet-certificate-authority=" + p("ca.crt"), "--kubelet-preferred-address-types=InternalIP",
		"--requestheader-client-ca-file=" + p("front-proxy-ca.crt"), "--requestheader-allowed-names=front-proxy-client",
		"--requestheader-extra-headers-prefix=X-Remote-Extra-", "--requestheader-group-headers=X-Remote-Group",
		"--requestheader-username-headers=X-Remote-User",
		"--proxy-client-cert-file=" + p("front-proxy.crt"), "--proxy-client-key-file=" + p("front-proxy.key"),
		// Webhooks are called at their pods' addresses: no kube-proxy runs here.
		"--enable-aggregator-routing=true", "--v=1",
	}
}

func (c *Cluster) controllerFlags() []string {
	p := c.pki.path
	return append(c.authFlags("kube-controller-manager"),
		"--service-account-private-key-file="+p("sa.key"), "--root-ca-file="+p("ca.crt"),
		"--cluster-signing-cert-file="+p("ca.crt"), "--cluster-signing-key-file="+p("ca.key"),
		"--use-service-account-credentials=true",
		// Who has lost the API server for a while begins anew, as in every cluster: one
		// that goes on takes all nodes for lost when it is back. Asked often, for the
		// first time it waits for the API server only.
		"--leader-elect=true", "--leader-elect-retry-period=200ms",
		// The default rate delays the first pods by four seconds.
		"--kube-api-qps=1000", "--kube-api-burst=2000",
		// It may come before the API server has its roles.
		"--authentication-tolerate-lookup-failure=true", "--v=1")
}

func (c *Cluster) authFlags(component string) []string {
	file := c.pki.path(component + ".kubeconfig")
	return []string{"--kubeconfig=" + file, "--authentication-kubeconfig=" + file, "--authorization-kubeconfig=" + file}
}
