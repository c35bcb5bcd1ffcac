// Package v1alpha2 stands in for k8s.io/cri-api/pkg/apis/runtime/v1alpha2, which Debian does not package.
//
// The stargz library's resolver needs one type of it, to look up credentials: these tests have none.
package v1alpha2

// AuthConfig is what the resolver reads of a container runtime's registry credentials.
type AuthConfig struct {
	Username, Password, Auth, ServerAddress, IdentityToken string
}
